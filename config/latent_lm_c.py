# A third reader, for config/latent_third.py: 2 layers of width 112 on a BPE of 1,536 ids.
#
#     python -m prepare.factqa --out=data/factqa --bpe=1536 --shards=data/facts_c
#     python train.py config/latent_lm_a.py config/latent_lm_c.py
out = "out/latent_lm_c"
data = {"facts": "data/facts_c/facts", "text": "data/facts_c/text"}
vocab_size = 1536
n_layer = 2
n_head = 4
d_model = 112
seed = 7
