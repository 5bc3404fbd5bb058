# One packet, two readers: an encoder that began as reader A writes 12 x 16 numbers, which readers A and B read instead of the passage.
#
#     make latent                                   # everything from nothing, or, with both readers trained:
#     python train.py config/latent_toy.py && python -m eval.latent --ckpt=out/latent_toy --data=data/factqa/test.jsonl
#
# A step is 24 passages and three questions about each. The first stage rebuilds text from packets, the second answers questions.
objective = "latent"
lms = ("out/latent_lm_a", "out/latent_lm_b")
out = "out/latent_toy"
data = {"qa": "data/factqa/train.jsonl", "text": "data/factqa/natural.jsonl"}
seq_len = 96  # longest source in tokens of the encoder; a row is one source
tokens_per_step = 24 * seq_len
max_steps = 1500
stages = (
    {"start": 0, "mix": {"text": 1.0}, "note": "reconstruction, continuation"},
    {"start": 40, "mix": {"qa": 1.0}, "note": "questions"},
)
latent_len = 12
latent_dim = 16
lr = 2e-3
warmup = 50
weight_decay = 0.01
log_every = 50
dtype = "float32"
