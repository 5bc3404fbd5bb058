# The second reader, as different as it can be: 2 layers of width 128 on a BPE of 2,048 ids (a passage is 29 tokens here, 43 in model A).
#
#     python -m prepare.factqa --out=data/factqa --bpe=2048 --shards=data/facts_b
#     python train.py config/latent_lm_a.py config/latent_lm_b.py
#
# Not good enough yet: it answers .87 of the questions from text, a fair trial wants .95 (LOG.md has what was tried).
out = "out/latent_lm_b"
data = {"facts": "data/facts_b/facts", "text": "data/facts_b/text"}
vocab_size = 2048
n_layer = 2
n_head = 4
d_model = 128
max_steps = 1600
stages = ({"start": 0, "mix": {"facts": 1.0}}, {"start": 1400, "mix": {"facts": 0.9, "text": 0.1}})
seed = 3
