"""FP8 matmuls for the Linears of model.py: torch's own scaled matmul, or TransformerEngine, at one call site.

    python train.py config/superbpe_197m.py --precision=fp8      (a CPU runs the same path with --fp8_emulate=True)

Masters, gradients and checkpoints are what they are in bf16; only three GEMMs change. A tensor is divided by one scale, so
that its largest magnitude meets the largest FP8 number, cast, multiplied, and the product is scaled back:
    forward y = x W^T (x, W in E4M3)      dgrad dx = g W      wgrad dW = g^T x (g in E5M2: range before precision)
Weights are cast once per optimizer step (`refresh`); evaluation, sampling and export run in bf16 (`evaluation`). Which GEMMs
are worth it, fallbacks and TransformerEngine: precision.py.
Read next: `Linear` in model.py, then precision.py.
"""

import contextlib
import functools
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import die
from machine import uncompiled
from precision import choose, hardware, linears, report, resolve, te_apply, te_load, te_scope, te_tensors

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MAX = {E4M3: 448.0, E5M2: 57344.0}


# ---- the arithmetic -----------------------------------------------------------------------------------------------------


def scale_of(amax, kind, margin=0):
    """What brings amax to the largest `kind`; divided in fp64, kept in fp32."""
    return (MAX[kind] / amax.double().clamp(min=1e-12) / 2**margin).float()


def cast(x, scale, kind):
    """The clamp is explicit: torch's own cast saturates in some versions and gives NaN in others."""
    return (x.float() * scale).clamp(-MAX[kind], MAX[kind]).to(kind)


def operand(x, kind, state, slot):
    """-> x in FP8, row-major, and its inverse scale. Delayed scaling keeps this operand's history in `slot`, a tensor (1,): a number of its
    own would compile every layer anew."""
    amax = x.detach().abs().amax().float()
    scale = scale_of(amax, kind, state.margin)
    if state.delayed:
        state.now.index_copy_(0, slot, torch.maximum(state.now.index_select(0, slot), amax))
        if state.warm:  # a Python bool: the cast must not wait for this tensor's own amax
            scale = state.scale.index_select(0, slot)[0]
    # amax * 0 is NaN for a non-finite amax: an infinity clamped to the maximum would hide from the loop's guard
    return cast(x, scale, kind).contiguous(), scale.reciprocal() + amax * 0


def gemm(a, b, inv_a, inv_b, dtype, fast=False):
    """a row-major, b column-major: the one layout Hopper multiplies."""
    return torch._scaled_mm(a, b, scale_a=inv_a, scale_b=inv_b, out_dtype=dtype, use_fast_accum=fast)


class Matmul(torch.autograd.Function):
    """y = x W^T, each of the three GEMMs in FP8 or in x.dtype. Plain traced ops, so that compile fuses amax and cast into
    what comes before; an opaque operator could not."""

    @staticmethod
    def forward(ctx, x, weight, wq, wqt, w_inv, slots, state, use):  # x (M, K), weight and wq (N, K), wqt (K, N)
        ctx.state, ctx.use, ctx.dtype = state, use, x.dtype
        xq = x_inv = x
        if use[0] or use[2]:
            xq, x_inv = operand(x, E4M3, state, slots[:1])
        ctx.save_for_backward(*((xq, x_inv) if use[2] else (x, x)), weight, wqt, w_inv, slots)
        return gemm(xq, wq.t(), x_inv, w_inv, x.dtype, fast=True) if use[0] else x @ weight.to(x.dtype).t()  # (M, N)

    @staticmethod
    def backward(ctx, g):  # (M, N)
        x, x_inv, weight, wqt, w_inv, slots = ctx.saved_tensors
        _, dgrad, wgrad = ctx.use
        if dgrad or wgrad:
            gq, g_inv = operand(g, ctx.state.grad_kind, ctx.state, slots[1:])
        dx = gemm(gq, wqt.t(), g_inv, w_inv, ctx.dtype) if dgrad else g @ weight.to(g.dtype)  # (M, K)
        if wgrad:  # both operands need a transposed copy; the output stays in the dtype of the masters
            dw = gemm(gq.t().contiguous(), x.t().contiguous().t(), g_inv, x_inv, weight.dtype)  # (N, K)
        else:
            dw = (g.t() @ x).to(weight.dtype)
        return dx, dw, None, None, None, None, None, None


def matmul(state, one, x, weight, bias):
    """What Linear.forward calls in place of model.py's default, which is `state.plain`."""
    if not (state.on and state.live) or weight.shape != one.wq.shape:  # a row slice of a fused weight has no FP8 copy
        return state.plain(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    odd = -flat.shape[0] % 16  # wgrad contracts over tokens, in sixteens; zero rows add nothing
    padded = F.pad(flat, (0, 0, 0, odd)) if odd else flat
    y = Matmul.apply(padded, weight, one.wq, one.wqt, one.inv, one.slots, state, one.use)[: flat.shape[0]]
    if state.watch is not None:
        state.watch(one, flat, weight, y)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


# ---- a model's state: apply, refresh, evaluation ------------------------------------------------------------------------


def apply(model, cfg, device, stages=(), hw=None):
    """Give a model, on its device with its weights loaded, the precision of `cfg`; -> the report to print.

    `stages`: (sequence length, tokens per micro-batch) of each curriculum row; the smallest micro-batch decides the filter."""
    hw, stages = hw or hardware(device), list(dict.fromkeys(stages)) or [(cfg.seq_len, cfg.micro_tokens or cfg.tokens_per_step)]
    mine, tokens = linears(model), min(m for _, m in stages)
    if old := getattr(model, "fp8", None):  # applied before: start again from the default
        for linear in mine.values():
            linear.matmul = old.plain
        for block in old.blocks:
            del block.forward
    plain, model.fp8 = "fp32" if getattr(model, "dtype", None) == torch.float32 else "bf16", None
    used, why = resolve(cfg, hw)
    if cfg.precision == "bf16":
        return f"precision: bf16 requested, {plain} used"
    if not hasattr(model, "embed"):
        die(f"precision={cfg.precision} is not made for objective={cfg.objective}: use --precision=bf16")
    slots = 2 * len(mine)  # 2i and 2i + 1: input and output gradient of Linear i, whatever the filter
    state = model.fp8 = SimpleNamespace(
        on=cfg.fp8_start_step == 0, live=True, start=cfg.fp8_start_step, plain=next(iter(mine.values())).matmul, watch=None, casts=0,
        ones=[], twins=[], blocks=[], uses={}, grad_kind=E4M3 if cfg.fp8_format == "e4m3" else E5M2, margin=cfg.fp8_margin,
        delayed=cfg.fp8_recipe == "delayed", warm=False, most_recent=cfg.fp8_algo == "most_recent", reduce=cfg.fp8_reduce_amax,
        now=torch.zeros(slots, device=device), history=torch.zeros(cfg.fp8_history, slots, device=device),
        scale=torch.ones(slots, device=device), saturated=torch.zeros(slots, device=device),
    )  # fmt: skip
    if used != "bf16" and cfg.parallel == "fsdp":
        die(f"precision={used} keeps whole FP8 copies of the weights: use --parallel=ddp, or --precision=bf16 with fsdp")
    if used == "te":
        te_apply(model, cfg, state, tokens)
    for i, (name, linear) in enumerate(mine.items() if used == "fp8" else ()):
        n, k = linear.weight.shape
        use = choose(cfg, linear.role, tokens, k, n, hw.name)
        if any(use):
            wq = torch.empty(n, k, dtype=E4M3, device=device)
            one = SimpleNamespace(name=name, linear=linear, use=use, slot=2 * i, wq=wq, wqt=wq.t().contiguous())
            one.inv, one.slots = torch.ones((), device=device), torch.tensor([2 * i, 2 * i + 1], device=device)
            linear.matmul = functools.partial(matmul, state, one)
            state.ones.append(one)
            state.uses[name] = use
    if used != "bf16" and not state.uses:
        used, why = "bf16", [*why, f"fp8_filter={cfg.fp8_filter} leaves 0 % of matmul FLOPs in FP8 at width {model.cfg.d_model}"]
    state.used = used
    refresh(model, step=False)
    line = f"precision: {cfg.precision} requested, {plain if used == 'bf16' else used} used" + "".join(f"; {w}" for w in why)
    if cfg.precision_required and used != cfg.precision:
        die(f"{line}: --precision_required=False accepts the fallback")
    return "\n".join([line, *report(model, cfg, hw, stages, plain)])


@torch.no_grad()
def refresh(model, step=True):
    """After every optimizer step: cast the masters once, move delayed scaling one step on. step=False: weights were loaded."""
    state = getattr(model, "fp8", None)
    if not state:
        return
    weights = [one.linear.weight for one in state.ones]
    for one, weight, amax in zip(state.ones, weights, torch._foreach_norm(weights, math.inf) if weights else (), strict=True):
        scale = scale_of(amax.float(), E4M3, state.margin)
        one.wq.copy_(cast(weight, scale, E4M3))
        one.wqt.copy_(one.wq.t())
        one.inv.copy_(scale.reciprocal() + amax * 0)
        one.version = weight._version
        state.casts += 1
    if not (step and state.delayed and state.ones and state.on):
        return
    if state.reduce and dist.is_initialized():
        dist.all_reduce(state.now, dist.ReduceOp.MAX)
    kinds = torch.tensor([MAX[E4M3], MAX[state.grad_kind]], dtype=torch.float64, device=state.now.device).repeat(len(state.now) // 2)
    state.saturated += (state.now * state.scale > kinds * (1 + 1e-6)) if state.warm else 0
    state.history.copy_(state.history.roll(1, 0))
    state.history[0] = torch.where(state.now.isfinite(), state.now, state.history[1])  # a skipped step leaves no NaN behind
    amax = state.history[0] if state.most_recent else state.history.amax(0)
    state.scale.copy_(torch.where(amax > 0, (kinds / amax.double() / 2**state.margin).float(), state.scale))
    state.now.zero_()
    state.warm = True


def set_step(model, step):
    """bf16 before fp8_start_step; -> the line to log when the step switches, else None. Call it at every step."""
    state = getattr(model, "fp8", None)
    if not state or state.on == (step >= state.start):
        return None
    state.on = not state.on
    return f"step {step}: {state.used} {'on' if state.on else 'off'} (fp8_start_step={state.start})"


@contextlib.contextmanager
def evaluation(model):
    """bf16 on the same module, uncompiled: what evaluation, sampling and export see."""
    state = getattr(model, "fp8", None) or SimpleNamespace(live=True)
    before, state.live = state.live, False
    try:
        with uncompiled():
            yield
    finally:
        state.live = before


def scope(model):
    """Around every forward of training. Native FP8 checks here that no weight changed behind the back of `refresh`."""
    state = getattr(model, "fp8", None)
    if not state:
        return contextlib.nullcontext()
    if stale := [one.name for one in state.ones if one.version != one.linear.weight._version]:
        raise RuntimeError(f"{stale[0]} changed since its FP8 copy was made: call fp8.refresh(model) after the optimizer step")
    return te_scope(state) if state.used == "te" else contextlib.nullcontext()


def memory(model):
    """Delayed scaling's histories, plain fp32 tensors by name; {} for every stateless choice."""
    state = getattr(model, "fp8", None)
    if not state or not state.delayed or state.used == "bf16":
        return {}
    return te_tensors(state) if state.used == "te" else {key: getattr(state, key).clone() for key in ("history", "scale", "saturated")}


def load_memory(model, saved):
    """Resume delayed scaling; after a run that kept no such memory it starts with one step of current scaling."""
    state = getattr(model, "fp8", None)
    if state and state.delayed:
        saved = {key: value.to(state.now.device) for key, value in saved.items()}
        if state.used == "te":
            te_load(state, saved)
        elif "history" in saved and saved["history"].shape == state.history.shape:
            for key, value in saved.items():
                getattr(state, key).copy_(value)
            state.warm = bool(state.history.any())  # saved before the first FP8 step, it has heard nothing yet
    refresh(model, step=False)
