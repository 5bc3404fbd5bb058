# The interlingua test: a model that was not there when the packets were learned joins. The encoder of out/latent_toy is frozen, one
# adapter of 31,089 numbers is trained; what it reaches tells whether packets are a language or a private code of two models.
#
#     python train.py config/latent_toy.py config/latent_third.py          # after `make latent` and the lines of config/latent_lm_c.py
#     python -m eval.latent --ckpt=out/latent_third --data=data/factqa/test.jsonl
lms = ("out/latent_lm_c",)
latent_reader = "out/latent_lm_a"  # whose tokens the encoder reads, as before
latent_from = "out/latent_toy"
out = "out/latent_third"
max_steps = 1500
lr = 4e-3
