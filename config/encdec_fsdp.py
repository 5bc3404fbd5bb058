"""The long-context form of encdec_ul2 on 8 GPUs: caps 4096/2048, about 256 examples a step, weights sharded.

torchrun --nproc_per_node=8 train.py config/encdec_ul2.py config/encdec_fsdp.py --init_from=out/encdec_init
Batch: a long source is about 4,000 encoder and 1,400 decoder tokens; 8 ranks x 5 packs x 32,768 are about 256 of them.
"""

out = "out/encdec_fsdp"
parallel = "fsdp"
remat = 1  # recompute every block: activations of 32,768 tokens would not fit beside the optimizer
max_enc, max_dec = 4096, 2048
micro_tokens, tokens_per_step = 32_768, 8 * 5 * 32_768
lr = 2e-4
save_every = 1000
