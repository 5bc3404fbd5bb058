# The second reader, as different as it can be: 2 layers of width 128 on a BPE of 2,048 ids (a passage is 29 tokens here, 43 in model A).
#
#     python -m prepare.factqa --out=data/factqa --bpe=2048 --shards=data/facts_b
#     python train.py config/latent_lm_a.py config/latent_lm_b.py
out = "out/latent_lm_b"
data = {"facts": "data/facts_b/facts", "text": "data/facts_b/text"}
vocab_size = 2048
n_layer = 3  # with 2 it answers seven of eight attributes and stays blind to one (LOG.md)
n_head = 4
d_model = 128
max_steps = 1300
stages = ({"start": 0, "mix": {"facts": 1.0}}, {"start": 1100, "mix": {"facts": 0.9, "text": 0.1}})
seed = 3
