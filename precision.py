"""Which precision runs, and why: hardware, fallbacks, filter, report; then the two TransformerEngine depths of precision=te.

    python bench.py --info          # prints info()

fp8.py calls all of it from `apply`. Read next: fp8.py (torch's own FP8), config/fp8_table.py (what is worth it).
"""

import difflib
import functools
import importlib.metadata
import importlib.util
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

from config import fp8_table
from configurator import die
from flash import flash

ROLES = ("qkv", "o", "gate_up", "down")  # never the embedding, its projection or the head: their error reaches the loss directly
GEMMS = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True)
class PrecisionConfig:
    # precision of the matmuls inside the blocks (fp8.py); masters, norms, head and loss are the same in each
    precision: Literal["bf16", "fp8", "te"] = "bf16"  # fp8: torch's scaled matmul; te: TransformerEngine
    precision_required: bool = False  # stop instead of falling back
    fp8_format: Literal["hybrid", "e4m3", "mxfp8"] = "hybrid"  # hybrid: gradients in E5M2; mxfp8: te on Blackwell
    fp8_recipe: Literal["current", "delayed", "block"] = "current"  # where scales come from; block: te only
    fp8_mode: Literal["full", "forward"] = "full"  # forward: both backward products stay bf16
    fp8_filter: str | tuple[str, ...] = "table"  # table | static | all | names of roles: gate_up,down
    fp8_start_step: int = 0  # bf16 before it
    fp8_emulate: bool = False  # run the fp8 path on a CPU, for tests and the debug config
    fp8_history: int = 16  # delayed scaling: steps remembered
    fp8_algo: Literal["max", "most_recent"] = "max"  # delayed scaling: over the history
    fp8_margin: int = 0  # scales are divided by 2^margin
    fp8_reduce_amax: bool = True  # delayed scaling: agree over ranks once per step
    te_block: bool = False  # te: a whole te.TransformerLayer per block instead of te.Linear
    fp8_attention: bool = False  # te_block on Hopper: attention in fp8 too
    fp8_stats_every: int = 0  # amax, underflow, saturation and signal-to-noise of every fp8 operand; 0: never


def linears(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "role")}


def hardware(device):
    """All that the choice depends on, asked once."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return SimpleNamespace(
        cuda=cuda,
        name=torch.cuda.get_device_name(device) if cuda else "no CUDA GPU",
        capability=torch.cuda.get_device_capability(device) if cuda else (0, 0),
        toolkit=tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2]),
        cudnn=torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled(),
        te=importlib.util.find_spec("transformer_engine") is not None,
    )


def resolve(cfg, hw):
    """-> the precision that will run, and why it is not the one asked for. Stops where no fallback would be honest."""
    gpu = f"{hw.name}, capability {hw.capability[0]}.{hw.capability[1]}" if hw.cuda else hw.name
    asked = f"this is precision={cfg.precision}, {gpu}"
    if cfg.fp8_format == "mxfp8" and (cfg.precision != "te" or hw.capability[0] != 10):
        die(f"fp8_format=mxfp8 needs precision=te and Blackwell 10.x; {asked}: use --fp8_format=hybrid")
    if cfg.fp8_recipe == "block" and (cfg.precision != "te" or hw.capability != (9, 0) or hw.toolkit < (12, 9)):
        cuda = ".".join(map(str, hw.toolkit))
        die(f"fp8_recipe=block needs precision=te, capability 9.0 and CUDA 12.9; {asked}, CUDA {cuda}: use --fp8_recipe=current")
    fits = cfg.precision == "te" and cfg.te_block and hw.capability >= (9, 0) and hw.cudnn and cfg.fp8_recipe != "block"
    if cfg.fp8_attention and not fits:
        die(f"fp8_attention needs precision=te, te_block, Hopper, cuDNN attention and no block scaling; {asked}: use --fp8_attention=False")
    used, why = cfg.precision, []
    if used == "te" and not hw.te:
        if cfg.fp8_recipe == "block" or cfg.fp8_format == "mxfp8" or cfg.fp8_attention:
            die(f"transformer_engine is not installed and {asked}: install it, or use --fp8_recipe=current --fp8_format=hybrid")
        used, why = "fp8", ["transformer_engine is not installed" + ", so te_block has no effect" * cfg.te_block]
    if used != "bf16" and not hw.cuda and not (used == "fp8" and cfg.fp8_emulate):
        used, why = "bf16", [*why, hw.name]
    if used != "bf16" and hw.cuda and hw.capability < (8, 9):
        used, why = "bf16", [*why, f"{gpu}: FP8 begins at 8.9"]
    return used, why


def measured(cfg, role, m, k, n, device):
    """{gemm: its speed-up at the nearest M measured on this device}; further off than four times as many tokens says nothing of these."""
    near = lambda row: abs(math.log(row[0][1] / m))  # noqa: E731
    rows = fp8_table.SPEEDUP.items() if cfg.fp8_filter == "table" and fp8_table.DEVICE == device else ()
    rows = [row for row in rows if (row[0][0], *row[0][2:4]) == (role, k, n) and near(row) <= math.log(4) + 1e-9]
    return {key[4]: speed for key, speed in sorted(rows, key=near, reverse=True)}


def choose(cfg, role, m, k, n, device):
    """-> (forward, dgrad, wgrad): which GEMMs of an (n, k) weight run in FP8 on m tokens."""
    wanted = cfg.fp8_filter
    named = ROLES if wanted == "all" else wanted.split(",") if isinstance(wanted, str) else wanted
    if wanted not in ("table", "static") and (unknown := set(named) - set(ROLES)):
        near = difflib.get_close_matches(min(unknown), {"table", "static", "all", *ROLES} - unknown, 1, 0.0)[0]
        die(f"fp8_filter: unknown name '{min(unknown)}'; did you mean '{near}'? table, static and all stand alone")
    if role not in ROLES or k % 16 or n % 16:
        return (False, False, False)
    if wanted in ("table", "static"):
        static = min(k, n) >= 256 and m >= 16384 and (n >= 2048 or k > 4096)
        table = measured(cfg, role, m, k, n, device)
        use = [table.get(g, 1.03 if static else 0.0) >= 1.03 for g in GEMMS]
    else:
        use = [role in named] * 3
    return (use[0], False, False) if cfg.fp8_mode == "forward" else tuple(use)


def report(model, cfg, hw, stages, plain):
    """What runs in what, and the share of matmul FLOPs in each precision, per stage."""
    m = model.cfg
    if not model.fp8:
        return []
    lines = [
        f"  {cfg.fp8_format}, {cfg.fp8_recipe} scaling, {cfg.fp8_mode}, from step {cfg.fp8_start_step}" + ("" if hw.cuda else ", emulated")
    ]
    if model.fp8.used == "te":
        lines.append("  TransformerEngine's modules run as they are" + ", between compiled parts" * cfg.compile)
    elif not cfg.compile:
        lines.append("  compile=False: the casts are not fused, so FP8 will be slower than bf16")
    flops, fewest = {"FP8": 0.0, plain: 0.0, "fp32": 0.0}, min(tokens for _, tokens in stages)
    device = hw.name if model.fp8.used == "fp8" else "TransformerEngine"  # the table is about torch's GEMMs
    for name, linear in linears(model).items():
        (n, k), use = linear.weight.shape, model.fp8.uses.get(name, (False,) * 3)
        if linear.role in ROLES:
            each = ", ".join(f"{g} {'FP8' if u else plain}" for g, u in zip(GEMMS, use, strict=True))
            rule = "measured" if measured(cfg, linear.role, fewest, k, n, device) else "static"
            lines.append(f"  {linear.role} {n} x {k}: {each}" + f"; {rule}" * (cfg.fp8_filter in ("table", "static")))
            for u in use:
                flops["FP8" if u else plain] += 2.0 * n * k
    proj = model.embed.proj.weight.numel() if model.embed.proj else 0
    flops[plain] += 6.0 * (2 * proj + m.vocab_size * model.head_weight.shape[1])  # the projection works at both ends
    flops["fp32"] += 6.0 * sum(p.weight.numel() for p in model.modules() if isinstance(p, torch.nn.Linear))  # routing gates
    for length, tokens in stages:
        both = [
            " / ".join(f"{key} {100 * (f + extra * (key == plain)) / (sum(flops.values()) + extra):.1f}" for key, f in flops.items())
            for extra in (0.0, 6.0 * m.n_layer * length * m.n_head * m.width_head)
        ]
        lines.append(f"  L={length}, {tokens} tokens: % of matmul FLOPs {both[0]}; attention included {both[1]}")
    return list(dict.fromkeys(lines))


def version(*packages):
    return next((d.version for name in packages for d in importlib.metadata.distributions(name=name)), "absent")


def info(cfg=None):
    """The machine, and the precision that it gives a config, or whoever asks for one."""
    hw = hardware("cuda" if torch.cuda.is_available() else "cpu")
    memory = f", {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if hw.cuda else ""
    cudnn, cublas = torch.backends.cudnn.version() or "absent", version("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12")
    te = version("transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12")
    lines = [
        f"device: {hw.name}{memory}, capability {hw.capability[0]}.{hw.capability[1]}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'absent'}, cuDNN {cudnn}, cuBLAS {cublas}",
        f"transformer_engine {te}, flash-attn {version('flash-attn')}, attention: {flash() if hw.cuda else 'torch SDPA'}",
    ]
    for asked in [cfg] if cfg else [PrecisionConfig(precision=name) for name in ("fp8", "te")]:
        used, why = resolve(asked, hw)
        lines.append(f"precision: {asked.precision} requested, {used} used" + "".join(f"; {w}" for w in why))
    return "\n".join(lines)


# ---- TransformerEngine --------------------------------------------------------------------------------------------------
# Written against the source of 2.20.2 and run with it on an H200, at both depths (LOG.md). Its modules borrow our parameters, so that
# masters, names and checkpoints stay ours, and they are never registered: `_extra_state` (a pickle) is neither saved nor loaded.
# torch.compile leaves them out: inside a graph 2.20.2 refuses delayed scaling, and most of its modules break the graph anyway.


def te_import():
    """Present but broken stops the run: falling back would report another system's speed under its name."""
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        pair = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuBLAS {version('nvidia-cublas', 'nvidia-cublas-cu12')}"
        te = version("transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12")
        die(f"transformer_engine {te} does not load beside {pair}: {error}; 2.12.0 and 2.20.2 load beside torch 2.11 and CUDA 13.0")
    return te


def te_recipe(cfg):
    from transformer_engine.common import recipe

    name = {"current": "Float8CurrentScaling", "delayed": "DelayedScaling", "block": "Float8BlockScaling"}[cfg.fp8_recipe]
    kind = getattr(recipe, "MXFP8BlockScaling" if cfg.fp8_format == "mxfp8" else name)
    extra = {"fp8_format": recipe.Format.HYBRID if cfg.fp8_format == "hybrid" else recipe.Format.E4M3, "fp8_dpa": cfg.fp8_attention}
    if cfg.fp8_recipe == "delayed":
        extra |= {"margin": cfg.fp8_margin, "amax_history_len": cfg.fp8_history, "amax_compute_algo": cfg.fp8_algo}
        extra |= {"reduce_amax": cfg.fp8_reduce_amax}
    if cfg.fp8_margin and cfg.fp8_recipe != "delayed":
        die(f"fp8_margin={cfg.fp8_margin} means nothing to TransformerEngine's {cfg.fp8_recipe} scaling: use --fp8_margin=0")
    if cfg.fp8_mode == "forward":
        if cfg.fp8_recipe == "delayed" or not hasattr(kind, "backward_override"):
            die("fp8_mode=forward: this TransformerEngine recipe has no high-precision backward; use --precision=fp8 or --fp8_mode=full")
        extra["backward_override"] = "high_precision"
    return kind(**extra)


def te_apply(model, cfg, state, tokens):
    te, m = te_import(), model.cfg
    state.te, state.recipe = te, te_recipe(cfg)
    if m.remat:
        die(f"precision=te cannot recompute blocks (remat={m.remat}): its scope ends with the forward; use --remat=0, or --precision=fp8")
    if not cfg.te_block:
        for name, linear in linears(model).items():
            n, k = linear.weight.shape
            use = choose(cfg, linear.role, tokens, k, n, "TransformerEngine")  # the table is about torch's GEMMs
            if any(use):
                twin = te.Linear(k, n, bias=linear.bias is not None, params_dtype=linear.weight.dtype, device=linear.weight.device)
                twin.weight = linear.weight
                if linear.bias is not None:
                    twin.bias = linear.bias
                linear.matmul = functools.partial(torch.compiler.disable(te_matmul), state, twin)
                state.uses[name] = use
                state.twins.append(twin)
        return
    odd = [
        k for k, bad in {"arch": m.arch != "decoder", "ffn": m.ffn != "swiglu" or m.act != "silu", "qkv_bias": m.qkv_bias}.items() if bad
    ]
    odd += ["fp8_filter"] * (cfg.fp8_filter not in ("all", "table"))  # all of it, whatever the table says
    odd += ["rope_bf16"] * m.rope_bf16 + ["micro_tokens"] * bool(tokens % 32)
    if odd:
        die(f"te_block=True cannot express {odd[0]}={getattr(cfg, odd[0])}: use --te_block=False")
    angle = torch.arange(m.max_len, device=model.inv_freq.device)[:, None] * model.inv_freq
    state.rotary = torch.cat((angle, angle), dim=1)[:, None, None]  # (positions, 1, 1, E), half-split
    state.uses = {name: (True, *[cfg.fp8_mode == "full"] * 2) for name, linear in linears(model).items() if linear.role in ROLES}
    for block in model.decoder.blocks:
        layer = te.TransformerLayer(
            m.d_model, m.width_ff, m.n_head, num_gqa_groups=m.kv_heads, kv_channels=m.width_head, layernorm_epsilon=m.norm_eps,
            hidden_dropout=0.0, attention_dropout=0.0, bias=False, normalization="RMSNorm", activation="swiglu", fuse_qkv_params=True,
            qkv_weight_interleaved=False, qk_norm_type="RMSNorm" if m.qk_norm else None, qk_norm_eps=m.norm_eps, qk_norm_before_rope=True,
            attn_input_format="thd" if cfg.doc_mask else "bshd", params_dtype=torch.float32, device=block.norm1.weight.device,
        )  # fmt: skip
        attn, mlp = layer.self_attention, layer.layernorm_mlp
        attn.layernorm_qkv.layer_norm_weight, attn.layernorm_qkv.weight = block.norm1.weight, block.attn.qkv.weight
        attn.proj.weight, mlp.layer_norm_weight = block.attn.out.weight, block.norm2.weight
        mlp.fc1_weight, mlp.fc2_weight = block.ffn.gate_up.weight, block.ffn.down.weight  # gate first in both
        if m.qk_norm:
            attn.q_norm.weight, attn.k_norm.weight = block.attn.q_norm.weight, block.attn.k_norm.weight
        block.forward = functools.partial(torch.compiler.disable(te_block), state, layer, block.forward, cfg.doc_mask)
        state.blocks.append(block)
        state.twins.append(layer)


def te_matmul(state, twin, x, weight, bias):
    if not state.live or weight.shape != twin.weight.shape:
        return state.plain(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast("cuda", torch.bfloat16):  # else it refuses fp32 weights
        odd = -flat.shape[0] % 32  # mxfp8 wants 32, the others 16
        y = twin(F.pad(flat, (0, 0, 0, odd)) if odd else flat)[: flat.shape[0]]
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def te_block(state, layer, plain, doc_mask, x, ctx):
    if not state.live:
        return plain(x, ctx)
    longest = ctx.segments.max_q
    with torch.autocast("cuda", torch.bfloat16):
        if doc_mask:  # flat tokens, documents by cu
            cu = ctx.cu[: ctx.segments.count + 1]
            lengths = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": longest, "max_seqlen_kv": longest}
            y = layer(x, self_attn_mask_type="padding_causal", rotary_pos_emb=state.rotary, **lengths)
        else:  # equal windows, batch first: its default, sequence first, would attend across the batch and still train
            y = layer(x.unflatten(0, (-1, longest)), self_attn_mask_type="causal", rotary_pos_emb=state.rotary[:longest]).flatten(0, 1)
    return y.to(x.dtype)


def te_scope(state):
    """Around the forward only; before fp8_start_step delayed scaling listens without casting."""
    return state.te.autocast(enabled=state.on, calibrating=state.delayed and not state.on, recipe=state.recipe)


def te_modules(state):
    """Every module with scales of its own, in an order that does not depend on whether it has run yet."""
    return [m for twin in state.twins for m in twin.modules() if hasattr(m, "fp8_meta")]


def te_tensors(state):
    """Scales and amax histories under our names."""
    found = (
        (i, side, m.fp8_meta[f"scaling_{side}"])
        for i, m in enumerate(te_modules(state))
        for side in ("fwd", "bwd")
        if f"scaling_{side}" in m.fp8_meta
    )
    return {f"te.{i}.{side}.{key}": getattr(s, key).float() for i, side, s in found for key in ("scale", "amax_history")}


@torch.no_grad()
def te_load(state, tensors):
    with state.te.autocast(enabled=True, recipe=state.recipe):  # outside of it the modules would ask for the default recipe
        for i, module in enumerate(te_modules(state)):
            if f"te.{i}.fwd.scale" in tensors:
                module.init_fp8_metadata(num_gemms=len(tensors[f"te.{i}.fwd.scale"]) // 3)  # input, weight, output of each
                for side in ("fwd", "bwd"):
                    for key in ("scale", "amax_history"):
                        getattr(module.fp8_meta[f"scaling_{side}"], key).copy_(tensors[f"te.{i}.{side}.{key}"])
