"""FP8 matmuls for the Linears of model.py: torch's own scaled matmul, or TransformerEngine, at one call site.

    python train.py config/superbpe_197m.py --precision=fp8      (a CPU runs the same path with --fp8_emulate=True)

Masters, gradients and checkpoints are what they are in bf16; only three GEMMs change. A tensor is divided by one scale, so
that its largest magnitude meets the largest FP8 number, cast, multiplied, and the product is scaled back:
    forward y = x W^T (x, W in E4M3)      dgrad dx = g W      wgrad dW = g^T x (g in E5M2: range before precision)
Weights are cast once per optimizer step (`refresh`); evaluation, sampling and export run in bf16 (`evaluation`). Which GEMMs
are worth it, fallbacks and TransformerEngine: precision.py.
Read next: `Linear` in model.py, fp8_triton.py (the casts on a GPU), then precision.py.
"""

import contextlib
import functools
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import die
from fp8_triton import E4M3, E5M2, MAX, cast, cast_both, cast_into, expect_sound_casts
from machine import uncompiled
from precision import choose, hardware, linears, report, resolve, te_apply, te_load, te_scope, te_tensors

# ---- the arithmetic -----------------------------------------------------------------------------------------------------


def scale_of(amax, kind, margin=0):
    """What brings amax to the largest `kind`; divided in fp64, kept in fp32."""
    return (MAX[kind] / amax.double().clamp(min=1e-12) / 2**margin).float()


def operand(x, kind, state, heard=None, used=None, both=True):
    """x (M, K) in FP8: row-major, transposed (None: not asked for), and its inverse scale. Delayed scaling keeps what it hears and what it
    uses in tensors (1,) of this operand alone: a number would compile every layer anew, and a tensor of all layers that one block's
    backward writes to is one that the graph of another block has saved."""
    amax = x.detach().abs().amax(1).amax().float()  # by rows first: so it rides on a norm, or on whatever else works along rows
    scale = scale_of(amax, kind, state.margin)
    if state.delayed:
        heard.copy_(torch.maximum(heard, amax))
        if state.warm:  # a Python bool: the cast must not wait for this tensor's own amax
            scale = used[0]
    q, qt = cast_both(x, scale, kind) if both else (cast(x, scale, kind).contiguous(), None)
    # amax * 0 is NaN for a non-finite amax: an infinity clamped to the maximum would hide from the loop's guard
    return q, qt, scale.reciprocal() + amax * 0


def gemm(a, b, inv_a, inv_b, dtype, fast=False):
    """a row-major, b column-major: the one layout Hopper multiplies."""
    return torch._scaled_mm(a, b, scale_a=inv_a, scale_b=inv_b, out_dtype=dtype, use_fast_accum=fast)


class Matmul(torch.autograd.Function):
    """y = x W^T, each of the three GEMMs in FP8 or in x.dtype. amax and scales are plain traced ops, which compile fuses into what comes
    before. wgrad contracts over tokens, so it needs both operands transposed: of x, that is all the backward keeps."""

    @staticmethod
    def forward(ctx, x, weight, wq, wqt, w_inv, one, state):  # x (M, K), weight and wq (N, K), wqt (K, N)
        ctx.one, ctx.state, ctx.dtype = one, state, x.dtype
        use, xq, xqt, x_inv = one.use, x, x, x
        if use[0] or use[2]:
            xq, xqt, x_inv = operand(x, E4M3, state, *one.inputs, both=use[2])
        ctx.save_for_backward(*((xqt, x_inv) if use[2] else (x, x)), weight, wqt, w_inv)
        return gemm(xq, wq.t(), x_inv, w_inv, x.dtype, fast=True) if use[0] else x @ weight.to(x.dtype).t()  # (M, N)

    @staticmethod
    def backward(ctx, g):  # (M, N)
        x, x_inv, weight, wqt, w_inv = ctx.saved_tensors  # x (K, M) in FP8 for wgrad
        _, dgrad, wgrad = ctx.one.use
        if dgrad or wgrad:
            gq, gqt, g_inv = operand(g, ctx.state.grad_kind, ctx.state, *ctx.one.grads, both=wgrad)
        dx = gemm(gq, wqt.t(), g_inv, w_inv, ctx.dtype) if dgrad else g @ weight.to(g.dtype)  # (M, K)
        # the output of FP8 stays in the dtype of the masters
        dw = gemm(gqt, x.t(), g_inv, x_inv, weight.dtype) if wgrad else (g.t() @ x).to(weight.dtype)  # (N, K)
        return dx, dw, None, None, None, None, None


def matmul(state, one, x, weight, bias):
    """What Linear.forward calls in place of model.py's default, which is `state.plain`."""
    if not (state.on and state.live) or weight.shape != one.wq.shape:  # a row slice of a fused weight has no FP8 copy
        return state.plain(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    odd = -flat.shape[0] % 16  # wgrad contracts over tokens, in sixteens; zero rows add nothing
    padded = F.pad(flat, (0, 0, 0, odd)) if odd else flat
    y = Matmul.apply(padded, weight, one.wq, one.wqt, one.inv, one, state)[: flat.shape[0]]
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
    grad_kind = E4M3 if cfg.fp8_format == "e4m3" else E5M2
    slots = 2 * len(mine)  # 2i and 2i + 1: input and output gradient of Linear i, whatever the filter
    state = model.fp8 = SimpleNamespace(
        on=cfg.fp8_start_step == 0, live=True, start=cfg.fp8_start_step, plain=next(iter(mine.values())).matmul, watch=None, casts=0,
        ones=[], twins=[], blocks=[], uses={}, grad_kind=grad_kind, margin=cfg.fp8_margin,
        delayed=cfg.fp8_recipe == "delayed", warm=False, most_recent=cfg.fp8_algo == "most_recent", reduce=cfg.fp8_reduce_amax,
        heard=[torch.zeros(1, device=device) for _ in range(slots)], scales=[torch.ones(1, device=device) for _ in range(slots)],
        history=torch.zeros(cfg.fp8_history, slots, device=device),
        kinds=torch.tensor([MAX[E4M3], MAX[grad_kind]] * len(mine), dtype=torch.float64, device=device),
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
            one = SimpleNamespace(name=name, linear=linear, use=use, slot=2 * i, inv=torch.ones((), device=device))
            one.wq, one.wqt = (torch.empty(*shape, dtype=E4M3, device=device) for shape in ((n, k), (k, n)))
            one.inputs, one.grads = zip(state.heard[2 * i : 2 * i + 2], state.scales[2 * i : 2 * i + 2], strict=True)
            linear.matmul, state.uses[name] = functools.partial(matmul, state, one), use
            state.ones.append(one)
    if used != "bf16" and not state.uses:
        used, why = "bf16", [*why, f"fp8_filter={cfg.fp8_filter} leaves 0 % of matmul FLOPs in FP8 at width {model.cfg.d_model}"]
    state.used = used
    if used == "bf16":  # nothing of it is left to switch, to report or to keep
        model.fp8 = None
    if state.ones and torch.device(device).type != "meta":
        expect_sound_casts([(torch.float32, E4M3), (model.dtype, E4M3), (model.dtype, state.grad_kind)], device)
    refresh(model, step=False)
    line = f"precision: {cfg.precision} requested, {plain if used == 'bf16' else used} used" + "".join(f"; {w}" for w in why)
    if cfg.precision_required and used != cfg.precision:
        die(f"{line}: --precision_required=False accepts the fallback")
    return "\n".join([line, *report(model, cfg, hw, stages, plain)])


@torch.no_grad()
def refresh(model, step=True):
    """After every optimizer step: cast the masters once, move delayed scaling one step on. step=False: weights were loaded."""
    state = getattr(model, "fp8", None)
    if not state or not state.ones:  # TransformerEngine keeps its own
        return
    weights = [one.linear.weight for one in state.ones]
    amax = torch.stack(torch._foreach_norm(weights, math.inf)).float()  # one launch for what can be one: there may be 112 Linears
    scales = scale_of(amax, E4M3, state.margin)
    torch._foreach_copy_([one.inv for one in state.ones], (scales.reciprocal() + amax * 0).unbind())
    for one, weight, scale in zip(state.ones, weights, scales.unbind(), strict=True):
        cast_into(weight, scale, one.wq, one.wqt)
        one.version = weight._version
        state.casts += 1
    if state.delayed:
        if step and state.on:
            listen(state)
        torch._foreach_copy_(state.scales, state.scale.split(1))


def listen(state):
    """The end of a step of delayed scaling: what was heard goes into the history, and the history decides on the next scales."""
    now = torch.cat(state.heard)
    torch._foreach_zero_(state.heard)
    if state.reduce and dist.is_initialized():
        dist.all_reduce(now, dist.ReduceOp.MAX)
    state.saturated += (now * state.scale > state.kinds * (1 + 1e-6)) if state.warm else 0
    rolled = state.history.roll(1, 0)
    rolled[0] = torch.where(now.isfinite(), now, state.history[0])  # a skipped step leaves no NaN behind
    state.history.copy_(rolled)
    amax = state.history[0] if state.most_recent else state.history.amax(0)
    state.scale.copy_(torch.where(amax > 0, (state.kinds / amax.double() / 2**state.margin).float(), state.scale))
    state.warm = True


def set_step(model, step):
    """bf16 before fp8_start_step; -> the line to log when the step switches, else None. Call it at every step."""
    state = getattr(model, "fp8", None)
    if state and state.delayed:
        torch._foreach_zero_(state.heard)  # by a step that was skipped
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
    if not state or not state.delayed:
        return {}
    return te_tensors(state) if state.used == "te" else {key: getattr(state, key).clone() for key in ("history", "scale", "saturated")}


def load_memory(model, saved):
    """Resume delayed scaling; after a run that kept no such memory it starts with one step of current scaling."""
    state = getattr(model, "fp8", None)
    if state and state.delayed:
        saved = {key: value.to(state.scale.device) for key, value in saved.items()}
        if state.used == "te":
            te_load(state, saved)
        elif "history" in saved and saved["history"].shape == state.history.shape:
            for key, value in saved.items():
                getattr(state, key).copy_(value)
            state.warm = bool(state.history.any())  # saved before the first FP8 step, it has heard nothing yet
            torch._foreach_copy_(state.scales, state.scale.split(1))
