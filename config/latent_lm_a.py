# A small language model that reads facts, for config/latent_toy.py: 0.38M parameters on a short BPE of 512 ids.
#
#     python -m prepare.factqa --out=data/factqa --bpe=512 --shards=data/facts_a
#     python train.py config/latent_lm_a.py                 # about 3 minutes on one core
#
# Documents are a passage of six facts and six questions, each answer closed by EOS: six chances per passage to learn to look up.
# Answer tokens weigh about 8:1 (the passage is trained in one document of eight, its values being noise). The lookup is found one
# attribute after the other; train/facts/loss ends near 0.25, which is the entropy of the passages that are trained.
out = "out/latent_lm_a"
data = {"facts": "data/facts_a/facts", "text": "data/facts_a/text"}
packing = "documents"
vocab_size = 512
n_layer = 3
n_head = 3
d_model = 96
init_std = 0.1  # narrow layers need large first weights: 1 / sqrt(96)
max_len = 1024
seq_len = 512
tokens_per_step = 2048
max_steps = 1300
stages = (  # English comes last, when the lookup has been found
    {"start": 0, "mix": {"facts": 1.0}},
    {"start": 1100, "mix": {"facts": 0.9, "text": 0.1}},
)
lr = 2e-3
warmup = 50
log_every = 50
dtype = "float32"  # at width 96 bf16 is not faster
best_metric = "val/facts/loss"
