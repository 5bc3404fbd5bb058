"""The parts of a training step alone, on a GPU, for bench.py: the loss of the head, attention, PolyGLU's mix, the optimizer.

    python bench.py --suite=gpu --only=head,attention,operator,optimizer

Each against what others install for the same work, in TFLOP/s or in GB/s of the fewest bytes that it must move.
Read next: eval/gpu.py, whole steps.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import model as prism
import ops
from eval.gpu import TINY, keys_of
from eval.peers import ceilings, compare, fresh, optimizer_of
from flash import flash
from train import Config

SHAPES = {
    "gpu": {
        "head": ((16_384, 1024, 151_669), (98_304, 128, 200_005)),  # tokens, width, vocabulary
        "attention": ((16, 4096, 16, 8, 64, True), (48, 2048, 12, 2, 64, True), (128, 512, 16, 8, 128, False)),  # ..., causal
        "operator": (16, 4096, 4096),  # rows, tokens, neurons
        "optimizer": "config/polyglu_h200.py",
    },
    "tiny": {
        "head": ((64, 32, 300),),
        "attention": ((2, 64, 4, 2, 16, True), (2, 64, 4, 2, 16, False)),
        "operator": (2, 32, 64),
        "optimizer": TINY,
    },
}


def head(opt, where):
    """Forward and backward of hidden states -> loss, weights in fp32. Ideal: the three products at the rate of a large one."""
    for n, d, v in SHAPES[opt.suite]["head"]:
        h = torch.randn(n, d, device=where.device, dtype=where.dtype, requires_grad=True)
        w = (0.02 * torch.randn(-(-v // 128) * 128, d, device=where.device)).requires_grad_()
        t = torch.randint(v, (n,), device=where.device)
        half = lambda w=w, v=v: w[:v].to(where.dtype)  # noqa: E731

        def both(loss, h=h, w=w):
            def step():
                loss().backward()
                h.grad = w.grad = None

            return step

        def liger(h=h, t=t, half=half, both=both):
            from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss()
            return both(lambda: loss(half(), h, t))

        def cut(eps, h=h, t=t, half=half, both=both):
            from cut_cross_entropy import linear_cross_entropy

            return both(lambda: linear_cross_entropy(h, half(), t, filter_eps=eps))

        def fused(h=h, t=t, half=half, both=both):
            return both(partial(lambda f: f(h, half(), t), F.linear_cross_entropy))

        makers = {"prism": lambda: both(lambda h=h, w=w, t=t, v=v: prism.linear_cross_entropy(h, w, t, v)[0] / n)}
        if n * v < 4e9:
            makers["torch, all logits"] = lambda h=h, t=t, half=half, both=both: both(lambda: F.cross_entropy(h @ half().t(), t))
        makers |= {"torch, fused": fused, "Liger": liger, "cut cross entropy": partial(cut, None)}
        makers["the same, filtered"] = partial(cut, "high")  # leaves out blocks of small probability: at random weights nearly all
        row = compare(f"head{d}", f"{n:,} tokens, {d} wide, {v:,} ids", makers, opt, where, n, flops=6 * n * d * v, repeat=2)
        row["ideal_ms"] = 1e3 * 6 * n * d * v / ceilings(where, opt.clock)[0]
        row["of_ideal"] = {side: row["ideal_ms"] / one["ms"] for side, one in row["sides"].items()}
        print(f"  of ideal ({row['ideal_ms']:.3g} ms): {', '.join(f'{k} {v:.0%}' for k, v in row['of_ideal'].items())}", flush=True)
        yield row


def forward_and_backward(name, what, forwards, inputs, opt, where, flops=(0, 0), nbytes=(0, 0), repeat=5):
    """Two rows of one operator, {side: () -> callable}: with what it keeps for the way back, and the way back alone."""

    def back(make):
        out = make()()
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True, allow_unused=True)

    for i, makers in enumerate((forwards, {side: partial(back, make) for side, make in forwards.items()})):
        way = ("forward", "backward")[i]
        yield compare(f"{name}_{way}", what, makers, opt, where, flops=flops[i], nbytes=nbytes[i], repeat=repeat)


def attention(opt, where):
    """The same FLOPs for every side, causal ones halved: 4 n^2 E per head forward, 2.5 times that backward."""
    for rows, length, heads, groups, width, causal in SHAPES[opt.suite]["attention"]:
        n, like = rows * length, {"device": where.device, "dtype": where.dtype, "requires_grad": True}
        q, k, v = (torch.randn(n, count, width, **like) for count in (heads, groups, groups))
        cu = torch.arange(rows + 1, device=where.device, dtype=torch.int32) * length
        ours = prism.Segments(cu, length, causal=causal)

        def dense(backend, qkv=(q, k, v), rows=rows, causal=causal, gqa=heads != groups):
            def run():
                with sdpa_kernel(backend):
                    args = [x.unflatten(0, (rows, -1)).transpose(1, 2) for x in qkv]
                    return F.scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=gqa)

            return run

        makers = {"prism": lambda ours=ours, q=q, k=k, v=v: partial(ours.attend, q, k, v)}
        makers |= {"SDPA, cuDNN": partial(dense, SDPBackend.CUDNN_ATTENTION), "SDPA, flash": partial(dense, SDPBackend.FLASH_ATTENTION)}
        what = f"{rows} x {length}, {heads}/{groups} heads of {width}, {'causal' if causal else 'bidirectional'}; prism: {flash()}"
        work = 4 * rows * heads * length**2 * width / (1 + causal)
        yield from forward_and_backward(f"attention{length}", what, makers, (q, k, v), opt, where, flops=(work, 2.5 * work))


def plain_polyglu(au, al, s):
    """PolyGLU as a compiler likes it: gates first, the softmax spelt out, nothing stacked."""
    (a, u), s = ops.full(au.unflatten(0, (len(al), -1))).chunk(2, -1), s.unflatten(0, (len(al), -1))
    z = [al[:, None, :, k] + s[..., k, None] for k in range(4)]
    top = torch.maximum(torch.maximum(z[0], z[1]), torch.maximum(z[2], z[3]))
    e = [torch.exp(one - top) for one in z]
    mixed = e[0] * torch.relu(a) + e[1] * torch.tanh(a) + e[2] * F.silu(a) + e[3] * F.gelu(a)
    return (mixed * u / (e[0] + e[1] + e[2] + e[3])).to(au.dtype).flatten(0, 1)


def operator(opt, where):
    """GB/s by the fewest passes over U = 2 N f bytes: 3 forward; backward 5, and 5.2 with the sums for the routing."""
    rows, length, f = SHAPES[opt.suite]["operator"]
    n, like = rows * length, {"device": where.device, "requires_grad": True}
    au, al, s = torch.randn(n, 2 * f, dtype=where.dtype, **like), torch.randn(rows, f, 4, **like), torch.randn(n, 4, **like)
    compiled = partial(torch.compile, dynamic=False) if opt.compile else lambda call: call
    swiglu, formula = compiled(lambda au: F.silu(au.chunk(2, -1)[0]) * au.chunk(2, -1)[1]), compiled(plain_polyglu)
    makers = {"polyglu": lambda: lambda: kernels.polyglu_mix(au, al, s), "swiglu": lambda: lambda: swiglu(au)}
    makers["polyglu, from its formula"] = lambda: lambda: formula(au, al, s)
    u = n * f * where.dtype.itemsize
    back = {"polyglu": 5.2 * u, "swiglu": 5 * u, "polyglu, from its formula": 5.2 * u}
    what = f"{n:,} tokens x {f} neurons, {'compiled' if opt.compile else 'eager'} swiglu and formula"
    import torch._functorch.config as functorch

    with functorch.patch(donated_buffer=False):  # a compiled backward pass is asked for again and again
        yield from forward_and_backward("operator", what, makers, (au, al, s), opt, where, nbytes=(3 * u, back))


def optimizer(opt, where):
    """What follows the last backward pass of a step, gradients in place."""
    keys = keys_of(SHAPES[opt.suite]["optimizer"])
    raw = fresh(Config(**keys, max_steps=1), where)
    params, count = list(raw.parameters()), raw.num_params()
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    clip = lambda: torch.nn.utils.clip_grad_norm_(params, 1.0)  # noqa: E731
    by = lambda kind: optimizer_of(raw, Config(**keys, max_steps=1, lr=1e-6, optimizer=kind)).step  # noqa: E731
    makers = {"adamw": partial(by, "adamw"), "muon": partial(by, "muon"), "norm and clipping": lambda: clip}
    traffic = {"adamw": 28 * count, "norm and clipping": 12 * count}  # p, g, m, v read, p, m, v written; g read twice, written once
    row = compare("optimizer", f"{count:,} parameters", makers, opt, where, nbytes=traffic, repeat=2)
    if where.peak:
        step = 524_288 * raw.flops_per_token(4096) / where.peak / 0.5
        row["of_step"] = {side: one["ms"] / 1e3 / step for side, one in row["sides"].items()}
        shares = ", ".join(f"{k} {v:.1%}" for k, v in row["of_step"].items())
        print(f"  of a step of 524,288 tokens at 50 % MFU ({step:.2f} s): {shares}", flush=True)
    yield row


ROWS = {"head": head, "attention": attention, "operator": operator, "optimizer": optimizer}
