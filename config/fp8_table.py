"""Measured worth of FP8 per GEMM, read by fp8.py when fp8_filter = "table"; rewritten by `python bench.py --fp8_table`.

speed-up over bf16 with the quantisation included, under torch.compile. A GEMM runs in FP8 from 1.03 up, by the nearest M;
one never measured within four times its M, or another device than `DEVICE`, falls to the static rule."""

DEVICE = ""  # torch.cuda.get_device_name() of the measurement
TORCH = ""  # its torch version
SPEEDUP = {}  # nothing measured yet; (role, M, K, N, "forward" | "dgrad" | "wgrad"): speed-up
