# One packet, two readers: an encoder that began as reader A writes 12 x 8 numbers, which readers A and B read instead of the passage.
#
#     make latent                                   # everything from nothing, or, with both readers trained:
#     python train.py config/latent_toy.py && python -m eval.latent --ckpt=out/latent_toy --data=data/factqa/test.jsonl
#
# A step is 24 passages with all six questions about each. No stage of reconstruction: 100 steps of it, on English or on passages, did
# not make the questions come sooner (LOG.md). With 8 numbers to a slot the adapters need a wide inner layer to make words of them.
objective = "latent"
lms = ("out/latent_lm_a", "out/latent_lm_b")
out = "out/latent_toy"
data = {"qa": "data/factqa/train.jsonl"}
seq_len = 96  # longest source in tokens of the encoder; a row is one source
tokens_per_step = 24 * seq_len
max_steps = 1400
latent_questions = 0
latent_len = 12
latent_dim = 8
adapter_hidden = 256
optimizer = "muon"
lr = 2e-3
warmup = 50
weight_decay = 0.01
log_every = 50
dtype = "float32"
