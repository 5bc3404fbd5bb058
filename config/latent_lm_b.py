# The second reader, as different as it can be: 2 layers of width 128 on a BPE of 2,048 ids.
#
#     python -m prepare.factqa --out=data/factqa --bpe=2048 --shards=data/facts_b
#     python train.py config/latent_lm_a.py config/latent_lm_b.py
out = "out/latent_lm_b"
data = {"facts": "data/facts_b/facts", "text": "data/facts_b/text"}
vocab_size = 2048
n_layer = 2
n_head = 4
d_model = 128
seed = 3
