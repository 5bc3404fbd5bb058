"""Numbers that no run can have are refused, and so are settings that would do nothing in it: typed on the command line they stop it,
from a config file they are named as it starts.

One config may follow another that trains something else (config/encdec_contrast.py after config/encdec_ul2.py), so what a file leaves
over is no mistake; what somebody has just typed is. `NEEDS` is all there is to it. Read next: train.py, which asks.
"""

import os
from dataclasses import fields
from pathlib import Path

from configurator import die, typed
from latent_data import LatentConfig
from optim import STAGE

SPARE = 512  # rows of an embedding that no token has, and nobody wonders: released models round their vocabulary up
ARCH = {"lm": "decoder", "denoise": "encdec"}  # what an objective can train, where that is one thing
KNOWN = {  # what the table below speaks of: another objective, feed-forward or schedule, of your own, may need any setting
    "objective": ("lm", "denoise", "contrast", "latent"),
    "ffn": ("swiglu", "polyglu"),
    "schedule": ("cosine", "linear", "wsd", "constant"),
}
SHAPE = """n_layer n_head n_kv_head d_model head_dim d_ff norm_eps qk_norm qkv_bias rope_theta rope_scaling rope_bf16 embed_rank ffn act
    acts gate gate_enc gate_block init_std remat"""
FP8 = "precision_required fp8_format fp8_recipe fp8_mode fp8_filter fp8_start_step fp8_history fp8_algo fp8_margin"
NEEDS = (  # what it takes, and which settings; a key without a value: it must be set at all
    ("objective=latent", " ".join(f.name for f in fields(LatentConfig))),
    ("packing=windows", "chunk"),
    ("objective=lm", "packing doc_mask chunk domains domains_every eval_stage auto_mix"),
    ("objective=lm|denoise", "eval_tokens epochs"),
    ("objective=lm|denoise or eval_sts", "eval_every best_metric"),
    ("objective=lm|latent", "seq_len"),
    ("objective=lm|denoise|latent", "mix mix_end tokens_per_step max_tokens micro_tokens"),
    ("objective=lm|denoise|contrast", "max_len arch vocab_size tie gate_noise allow_noncausal precision compile decay_embed"),
    ("objective=lm|denoise|contrast or latent_encoder=pool|byte", SHAPE),
    ("objective=denoise", "mixture mixture_end mode_tokens max_dec closing_sentinel length_adaptive snap analyze_batch"),
    ("objective=denoise|contrast", "max_enc eval_sts"),
    ("objective=contrast", "contrast_tau contrast_pairs contrast_micro contrast_symmetric contrast_pooling"),
    ("arch=decoder|encdec", "gate allow_noncausal"),
    ("arch=encdec", "cross_rope n_sentinels"),
    ("arch=encoder|encdec", "gate_enc eos_id"),
    ("ffn=swiglu", "act"),
    ("ffn=polyglu", "acts gate gate_enc gate_block gate_noise allow_noncausal tau_max tau_min"),
    ("objective=lm|denoise|contrast", "tau_max tau_min"),
    ("gate=lagged or gate_enc=lagged", "gate_block"),
    ("gate=sequence", "allow_noncausal"),
    ("optimizer=muon", "muon_lr muon_momentum"),
    ("schedule=wsd", "decay_share"),
    ("schedule=cosine|linear|wsd", "min_lr_ratio"),
    ("warmup", "warmup_from"),
    ("precision=fp8|te", FP8),
    ("precision=fp8", "fp8_emulate fp8_stats_every"),
    ("precision=te", "te_block fp8_attention"),
    ("fp8_recipe=delayed", "fp8_history fp8_algo fp8_reduce_amax"),
    ("mix_end", "mix_decay_start"),
    ("auto_mix", "domain_source"),
    ("domains", "domains_every"),
    ("eval_every", "domains_every auto_mix"),
    ("latent_ratio=0", "latent_len"),
    ("latent_encoder=lm|query|sent", "latent_reader latent_layers latent_blocks latent_frozen"),
    ("adapter=mlp", "adapter_hidden"),
    ("w_kd", "kd_tau"),
    ("w_k or w_kd", "first_k"),
    ("wire_bits or wire_slots", "wire_start"),
    ("calibration=fixed", "prefix_rms"),
)

POSITIVE = """vocab_size n_layer n_head d_model max_len gate_block seq_len tokens_per_step decay_share tau_max tau_min max_enc max_dec
    contrast_tau contrast_pairs contrast_micro fp8_history kd_tau latent_dim latent_len first_k rope_theta init_std eps domains_every
    tokens rows accum""".split()  # the last three: of a stage
MOST = {  # sizes end above what anybody trains: past them a run is not refused for want of memory, but planned and built for hours
    1: "norm_eps min_lr_ratio warmup_from decay_share mix_decay_start wire_start",
    32: "fp8_margin",
    1 << 12: "n_layer n_head latent_layers latent_blocks",
    1 << 20: "d_model head_dim d_ff embed_rank latent_dim latent_len latent_private adapter_hidden contrast_pairs contrast_micro",
    1 << 26: "vocab_size max_len seq_len max_enc max_dec tokens_per_step micro_tokens rows accum fp8_history",
}


def bounded(values, where=""):
    """NaN lies within no bounds, and infinity above them: a config file can say both. 2^53: above it a float counts no steps."""
    for key, value in values.items():
        low, high = -32 if key == "fp8_margin" else 0, next((most for most, keys in MOST.items() if key in keys.split()), 1 << 53)
        if type(value) in (int, float) and not (low <= value <= high and (value or key not in POSITIVE)):
            must = f"{high:,} or less" if value > high else "above 0" if key in POSITIVE else f"{low} or more"
            die(f"{where}{key}={value} must be {must}")


def possible(cfg):
    """Refuse numbers that no run can have."""
    bounded(vars(cfg))
    if not cfg.out:
        die("--out= names no folder: give one, as --out=out/RUN")
    if cfg.arch != (fit := ARCH.get(cfg.objective, cfg.arch)):
        die(f"objective={cfg.objective} trains no arch={cfg.arch}: set --arch={fit}")
    for n, row in enumerate(cfg.stages):
        bounded({key: typed(STAGE, key, [value], f"stages[{n}]") for key, value in row.items()}, f"stages[{n}]: ")
        bounded({"tokens_per_step": row.get("seq_len", cfg.seq_len) * row.get("rows", 1) * row.get("accum", 1)}, f"stages[{n}]: in all ")
    if isinstance(cfg.data, dict) and (not cfg.data or any(not name or "/" in name or name in ("mean", "sd") for name in cfg.data)):
        die(f"data={cfg.data}: give {{name: folder}}; metrics are called by the name, so it is not empty, mean or sd, and has no slash")
    if "," in cfg.data and not isinstance(cfg.data, dict) and not os.path.exists(cfg.data):
        die(f'data={cfg.data}: several sources are written --data="{ {Path(folder).name: folder for folder in cfg.data.split(",")} }"')
    if {"contrast": cfg.max_tokens or cfg.epochs or any("tokens" in row for row in cfg.stages), "latent": cfg.epochs}.get(cfg.objective):
        die(f"max_tokens={cfg.max_tokens}, epochs={cfg.epochs}: objective={cfg.objective} counts steps: set --max_steps; in stages `start`")
    for key in {"denoise": ("max_enc", "max_dec"), "contrast": ("max_enc",)}.get(cfg.objective, ()):
        if not 1 < getattr(cfg, key) <= cfg.max_len:  # told here, not by the first long text: 1 is an EOS and no text
            die(f"{key}={getattr(cfg, key)} must lie in 2..{cfg.max_len}, what the model reads at most; change it, or --max_len")
    if cfg.tau_max < cfg.tau_min:
        die(f"tau_max={cfg.tau_max} is below tau_min={cfg.tau_min}, and the temperature only falls: set --tau_min={cfg.tau_max}")
    if cfg.mix_end and cfg.mix_decay_start >= 1:
        die(f"mix_decay_start={cfg.mix_decay_start}: mix_end is never walked to; set it below 1, or leave mix_end out")
    for key, values in (("betas", cfg.betas), ("muon_momentum", (cfg.muon_momentum,))):
        if not all(0 <= value < 1 for value in values):
            die(f"{key}={getattr(cfg, key)} must lie in [0, 1)")
    for key in ("lr", "muon_lr")[: 1 + (cfg.optimizer == "muon")]:
        if (rate := getattr(cfg, key)) * cfg.weight_decay >= 1:
            die(f"{key}={rate} x weight_decay={cfg.weight_decay}: one step would decay a weight to 0 or past it; lower one of them")
    if cfg.stats_every and (cfg.objective == "latent" or cfg.parallel == "fsdp"):
        die("stats_every reads one whole Transformer on rank 0: not for objective=latent, nor with --parallel=fsdp; leave it at 0")
    if cfg.optimizer == "muon" and not cfg.lr:
        die("optimizer=muon scales by muon_lr / lr: lr must be above 0; set --lr=3e-3")


def met(cfg, need):
    key, _, values = need.partition("=")
    value = getattr(cfg, key)
    return value not in KNOWN.get(key, (value,)) or (str(value) in values.split("|") if values else bool(value))


def unused(cfg):
    """-> {setting that this run never asks for: what it would take}"""
    unmet = [(need, keys) for need, keys in NEEDS if not any(met(cfg, part) for part in need.split(" or "))]
    return {key: need for need, keys in reversed(unmet) for key in keys.split()}


def idle(cfg, argv=(), ids=0):
    """-> the settings of `cfg` that are not at their defaults and change nothing, each with what it would take. ids: that its data has."""
    typed = {arg.partition("=")[0] for arg in argv}
    found = {key: need for key, need in unused(cfg).items() if getattr(cfg, key) != getattr(type(cfg), key)}
    for words in ("rows tokens_per_step micro_tokens", "accum micro_tokens", "seq_len seq_len", "clip clip", "mix mix"):
        given, *keys = words.split()
        asked = given == "mix" and cfg.auto_mix  # it starts from `mix`, whatever the stages say
        for key in keys if cfg.stages and all(given in row for row in cfg.stages) and not asked else ():
            if getattr(cfg, key) != getattr(type(cfg), key):
                found.setdefault(key, f"a stage without `{given}`")
    for row in cfg.stages:
        vain = {"contrast": "seq_len rows accum mix", "denoise": "" if "rows" in row else "seq_len"}.get(cfg.objective, "")
        found |= {f"stages.{key}": "objective=lm|latent" for key in vain.split() if key in row}
    for key, need in found.items():
        if f"--{key}" in typed:
            die(f"--{key}={getattr(cfg, key)} would do nothing here: it needs {need}")
    if cfg.parallel == "fsdp" and os.environ.get("WORLD_SIZE", "1") == "1":  # never refused: one process may go on with a run of several
        found["parallel"] = "torchrun with several processes"
    if cfg.auto_batch and os.environ.get("WORLD_SIZE", "1") != "1":
        found["auto_batch"] = "one process"
    if ids and cfg.vocab_size - (cfg.n_sentinels + 4) * (cfg.arch == "encdec") > ids + SPARE:
        found["vocab_size"] = f"a tokenizer of more than {ids:,} ids"
    return ", ".join(f"{key} (needs {need})" for key, need in found.items())
