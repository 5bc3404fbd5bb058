"""Which FP8 products pay on this card: measured in the form that the filter of fp8.py reads.

    python bench.py --fp8_table                                  # rewrites config/fp8_table.py; needs a GPU
    python bench.py --fp8_table config/superbpe_197m.py --micro_tokens=49152       # and the shapes of this run, at its micro-batch

Each product of each role is timed compiled, against the same one in bf16: forward and dgrad with the cast of their operand in both
layouts, wgrad, which finds both there, alone.
Read next: fp8.py.
"""

import statistics
import time
from types import SimpleNamespace

import torch

import configurator
from config import fp8_table
from fp8 import E4M3, E5M2, gemm, operand
from machine import wait
from model import build
from optim import Plan
from precision import ROLES, linears
from train import Config


def shapes_of(argv):
    """[(role, M, K, N)] of a run, `argv` as train.py takes it; M is its smallest micro-batch, which decides the filter."""
    cfg = configurator.load(Config, argv)[0]
    tokens = -(-min(stage.micro_tokens for stage in Plan(cfg, 1, epoch_tokens=1 << 40).stages) // 16) * 16
    every = [(one.role, tokens, *reversed(one.weight.shape)) for one in linears(build(cfg, "meta")).values() if one.role in ROLES]
    return [shape for shape in dict.fromkeys(every) if not any(n % 16 for n in shape[1:])]


def measure_table(device, argv=(), tokens=98304, widths=(768, 1536, 2048), repeats=10, calls=8, backend="inductor"):
    """{(role, M, K, N, gemm): speed-up over bf16}, casts and transposed copies included, compiled. M, K, N as in `choose`."""
    device, state, found = torch.device(device), SimpleNamespace(margin=0, delayed=False), {}
    torch._dynamo.config.recompile_limit = 64  # the same code for every shape: past eight of them torch would go on uncompiled

    def clock(f, *args):
        """Several in a row, as in a step: alone, one of 0.3 ms would wait as long for Python, which has more to start of FP8."""
        times = []
        for _ in range(repeats + 3):
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                f(*args)
            wait(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[3:])

    shapes = []
    for width in widths:
        inner = width * 8 // 3 // 128 * 128
        qkv = -(-width * 4 // 3072) * 1024
        some = (("qkv", width, qkv), ("o", width, width), ("gate_up", width, 2 * inner), ("down", inner, width))
        shapes += [(role, tokens, k, n) for role, k, n in some]
    for role, m, k, n in dict.fromkeys([*shapes, *(shapes_of(argv) if argv else ())]):
        x, g, w = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((m, k), (m, n), (n, k)))
        (_, xt, xi), (_, gt, gi), (wq, wqt, wi) = operand(x, E4M3, state), operand(g, E5M2, state), operand(w, E4M3, state)

        def forward(x):
            xq, _, xi = operand(x, E4M3, state)
            return gemm(xq, wq.t(), xi, wi, torch.bfloat16, fast=True)

        def dgrad(g):
            gq, _, gi = operand(g, E5M2, state)
            return gemm(gq, wqt.t(), gi, wi, torch.bfloat16)

        def wgrad(gt, xt):
            return gemm(gt, xt.t(), gi, xi, torch.float32)

        pairs = {
            "forward": ((lambda x: x @ w.t(), x), (forward, x)),
            "dgrad": ((lambda g: g @ w, g), (dgrad, g)),
            "wgrad": ((lambda g, x: g.t() @ x, g, x), (wgrad, gt, xt)),
        }
        for name, (plain, ours) in pairs.items():
            fused = torch.compile(ours[0], dynamic=False, backend=backend)  # a bf16 product alone has nothing to fuse
            found[role, m, k, n, name] = round(clock(*plain) / clock(fused, *ours[1:]), 3)
    return found


def write_table(path=fp8_table.__file__, device="cuda", argv=(), **keys):
    """`python bench.py --fp8_table`: measure, and rewrite config/fp8_table.py."""
    rows = "".join(f"    {key!r}: {value},\n" for key, value in measure_table(device, argv, **keys).items())
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    with open(path, "w") as file:
        file.write(f'"""{fp8_table.__doc__}"""\n\nDEVICE = {name!r}\nTORCH = {torch.__version__!r}\nSPEEDUP = {{\n{rows}}}\n')
    return rows
