# A small language model that reads facts, for config/latent_toy.py: 0.44M parameters on a short BPE of 1,152 ids.
#
#     python -m prepare.factqa --out=data/factqa --bpe=1152 --shards=data/facts_a
#     python train.py config/latent_lm_a.py                 # about 3 minutes on one core
#
# Documents are a passage of six facts and six questions, each answer closed by EOS: six chances per passage to learn to look up.
# Answer tokens weigh about 4:1 (the passage is trained in one document of eight, its values being noise). The lookup is found one
# attribute after the other; AdamW was still blind to some after 1,600 steps, Muon has found all eight by 700.
out = "out/latent_lm_a"
data = {"facts": "data/facts_a/facts", "text": "data/facts_a/text"}
mix = {"facts": 0.97, "text": 0.03}
packing = "documents"
vocab_size = 1152
n_layer = 3
n_head = 3
d_model = 96
init_std = 0.1  # narrow layers need large first weights: 1 / sqrt(96)
max_len = 1024
seq_len = 512
tokens_per_step = 2048
max_steps = 1000
optimizer = "muon"
lr = 2e-3
warmup = 50
log_every = 50
dtype = "float32"  # at width 96 bf16 is not faster
best_metric = "val/facts/loss"
