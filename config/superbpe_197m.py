"""A decoder of 196,398,464 parameters on SuperBPE tokens: 28 layers of width 768, 200,005 ids, embedding factorised at rank 128.

    python -m prepare.text --from='fineweb_edu/*.parquet' --min_chars=100 --val=0.05 --tokenizer=superbpe_t80k --out=data/fineweb_t80k
    python train.py config/superbpe_197m.py config/curriculum_ultra.py                        bf16
    python train.py config/superbpe_197m.py config/curriculum_ultra.py --precision=fp8        torch's scaled matmul; te: TransformerEngine
    torchrun --nproc_per_node=8 train.py config/superbpe_197m.py config/curriculum_ultra.py --micro_tokens=12288
    python train.py config/superbpe_197m.py --out=out/superbpe_sft --init_from=out/superbpe_197m --data=CHATS --packing=documents --lr=2e-5

layer 6,096,384 = q 589,824 + kv 196,608 + o 589,824 + ffn 4,718,592 + norms 1,536; x 28 = 170,698,752; E 25,600,640; P 98,304;
final norm 768. --tie=False --parameters=350002304 is the full head.
Loss at init 12.36 = ln 200,005 + 768 x 0.02^2 / 2, less if something leaks.
A step is 98,304 tokens, 48 windows of 2,048. micro_tokens: 98,304 takes 65 GiB of an H200; 49,152 for 80 GB and
12,288 for 24 GB are estimates.
Read next: config/curriculum_ultra.py, the stages; precision.py, what --precision really runs.
"""

out = "out/superbpe_197m"
data = "data/fineweb_t80k"
vocab_size = 200005
parameters = 196_398_464  # --parameters=0 with another shape
n_layer, n_head, n_kv_head, d_model, head_dim, d_ff = 28, 12, 2, 768, 64, 2048
embed_rank = 128
qk_norm = False
max_len = 4096
seq_len, tokens_per_step, micro_tokens = 2048, 98304, 98304
chunk = 6144  # a multiple of every window of every curriculum_*.py, flat too: all read the data in one order. For 4,096: --chunk=12288
max_tokens = 2048 * 10**6
lr, warmup = 6e-4, 208  # 1 % of 20,834 steps
compile = True
log_every, eval_every, save_every, keep = 100, 2000, 2000, 3
best_metric = "val/mean/bpb"  # per byte: the only loss that compares tokenizers
