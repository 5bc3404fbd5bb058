"""Checkpoints: folders of safetensors and json, whole at every moment, checked when read.

    out/RUN/config.json history.json tokenizer/ latest -> step-000200 best -> step-000100
    out/RUN/step-000200/model.safetensors optim.safetensors state.json

A save is written beside its final name, synced to the disk and renamed; a kill at any moment leaves the previous one in place.
`state.json` holds sha256s of its neighbours and itself, optim.safetensors RNG states as metadata. Weights are the raw module's, whole.

    model, state = checkpoint.load("out/RUN", device="cpu")    # eval mode; state: step, config, metrics, ...

Read next: train.py, which saves and resumes; sample.py and hub.py, which load.
"""

import hashlib
import json
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import configurator
from configurator import die
from files import hold, sync, write_json
from model import ModelConfig, Transformer

FILES = ("model.safetensors", "optim.safetensors")
TENSORS = "arch n_layer n_kv_head d_model head_dim d_ff qk_norm qkv_bias tie embed_rank ffn"  # what their shapes tell of
SHAPES = f"""{TENSORS} vocab_size n_head gate acts norm_eps rope_theta rope_scaling lms adapter adapter_hidden latent_encoder latent_reader
    latent_layers latent_blocks latent_frozen latent_from latent_len latent_ratio latent_dim latent_private calibration"""  # all to set


# ---- a run and its folders ----------------------------------------------------------------------------------------------


def point(link: Path, target: str):
    new = link.with_name(f".tmp-{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    link.is_symlink() or shutil.rmtree(link, ignore_errors=True)  # a copy of the run that followed links has a folder there
    os.replace(new, link)


def digest(path):
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def digest_json(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def steps(run) -> dict[int, Path]:
    """Checkpoints of a run by step number, ascending: names count, times do not."""
    found = {int(p.name[5:]): p for p in Path(run).glob("step-*") if p.name[5:].isdigit() and (p / "state.json").is_file()}
    return dict(sorted(found.items()))


def lock(run):
    """Hold the run directory until the process ends; a second holder is refused."""
    if not os.path.isdir(run):
        os.makedirs(run, exist_ok=True)
        sync(Path(run).parent)
    path = Path(run) / ".lock"
    held = hold(path) or die(f"{run}: process {path.read_text() or 'another'} is training here; wait for it or choose another --out")
    held.truncate(0)
    print(os.getpid(), end="", file=held, flush=True)
    return held


def start_run(run, cfg, info, resumed=None):
    """config.json (the settings, and `info`: commit, versions, hardware) and the tokenizer, so that the folder stands alone."""
    write_json(Path(run) / "config.json", {"config": configurator.to_dict(cfg), **info})
    folders = list(cfg.data.values()) if isinstance(cfg.data, dict) else [cfg.data]
    start = [resolve(resumed or cfg.init_from).parent] if resumed or cfg.init_from else []  # an encoder-decoder's knows its markers
    for source in [Path(folder) / "tokenizer" for folder in (start + folders if cfg.arch == "encdec" else folders + start)]:
        if source.is_dir() and not (Path(run) / "tokenizer").exists():
            shutil.rmtree(new := Path(run) / ".tmp-tokenizer", ignore_errors=True)
            shutil.copytree(source, new)
            for file in [*new.rglob("*"), new]:
                sync(file)
            os.replace(new, Path(run) / "tokenizer")


def resolve(path, which=None) -> Path:
    """A step directory: `path` itself if it is one, else the run's `which`, by default its best, else its latest."""
    if ((path := Path(path)) / "state.json").is_file():
        return path
    if not (found := steps(path)):
        if (path / "config.json").is_file() and list(path.glob("*.safetensors")):
            die(f"{path}: an exported folder; make it a run: python -m hub import --from={path} --out=out/RUN")
        more = "; correct the path, or make it: the top of the config says how" * (not path.exists())
        die(f"{path}: no checkpoint here; give a run directory (out/RUN) or one of its step-NNNNNN folders{more}")
    if links := [path / name for name in ([which] if which else ["best", "latest"]) if (path / name / "state.json").is_file()]:
        return path / (os.readlink(links[0]) if links[0].is_symlink() else links[0].name)  # a copy may have followed it
    return list(found.values())[-1] if which != "best" else die(f"{path}: has no best checkpoint; use latest, or set --eval_every")


def find_resume(run, how):
    """What `--resume=how` means: None for a new run, else a step directory. A new run never overwrites an old one."""
    if how in ("", "auto"):
        if steps(run) and not how:
            die(f"{run}: holds a run already; --resume goes on with it, --out=DIR starts another, or delete the folder")
        return resolve(run, "latest") if steps(run) else None
    if how in ("latest", "best") and not steps(run) and (Path(run) / ".lock").exists():
        lock(run)  # says so where another process has yet to write its first checkpoint
    how in ("latest", "best") or os.path.isdir(how) or die(f"--resume={how}: no such folder; give latest, best, auto or a step folder")
    found = resolve(run, how) if how in ("latest", "best") else resolve(how, "latest")
    if steps(run) and found.parent.resolve() != Path(run).resolve():  # `rotate` would take the checkpoints here for a lost future
        die(f"--resume={how} is another run than --out={run}, which holds one: choose a new --out")
    return found


# ---- saving and loading -------------------------------------------------------------------------------------------------


def whole(tensor, keep=True):
    """A parameter or state tensor on the CPU; gathers the shards of a fully sharded one, so every rank must ask for it, kept or not."""
    tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
    return tensor.cpu().contiguous() if keep else None


def random_state() -> str:
    name, keys, *rest = np.random.get_state()
    state = {"torch": bytes(torch.get_rng_state()).hex(), "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}
    return json.dumps(state | ({"cuda": bytes(torch.cuda.get_rng_state()).hex()} if torch.cuda.is_initialized() else {}))


def set_random_state(text: str):
    state = json.loads(text)
    (version, internal, gauss), unhex = state["python"], lambda text: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(unhex(state["torch"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(unhex(state["cuda"]))


def rotate(run, step, keep):
    """Leave the newest `keep` steps and the best. Steps later than `step` belong to a future that a resume from here abandoned."""
    best, found = os.readlink(run / "best") if (run / "best").is_symlink() else None, steps(run)
    kept = [s for s in found if s <= step][-keep:]
    for s, path in found.items():
        if s > step or (s not in kept and path.name != best):
            os.replace(path, run / f".tmp-{path.name}-old")  # a folder is whole or absent, also while it is deleted
    sync(run)  # a power cut between may bring back what is deleted below, never take what replaces it
    for old in run.glob(".tmp-step-*-old"):
        shutil.rmtree(old)
    not best or (run / best).exists() or (run / "best").unlink()


def save(run, step, model, optimizer, state: dict, keep, metric=None, is_best=False):
    """Called by every rank (the others help where weights are sharded), written by the first; -> bytes on disk."""
    helps = int(os.environ.get("RANK", 0))
    if helps and not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return 0
    weights = {n: whole(t, not helps) for n, t in model.state_dict().items()}
    moments = {f"fp8/{k}": t.cpu() for k, t in state.pop("fp8", {}).items()}
    for name, p in model.named_parameters() if optimizer else ():
        moments |= {f"{name}.{kind}": whole(value, not helps) for kind, value in optimizer.state.get(p, {}).items()}
    if helps:
        return 0
    run, name = Path(run), f"step-{step:06d}"
    new, final = run / f".tmp-{name}", run / name
    try:
        for stale in run.glob(".tmp-step-*"):  # of a run killed while saving
            shutil.rmtree(stale)
        new.mkdir(parents=True)
        for file, tensors, about in zip(FILES, (weights, moments), (None, {"rng": random_state()}), strict=True):
            save_file(tensors, new / file, metadata=about)
            sync(new / file)
        body = {"format": 1, "step": step, "optimizer": type(optimizer).__name__ if optimizer else "no optimizer"}
        body = json.loads(json.dumps(state | body | {"sha256": {f: digest(new / f) for f in FILES}}))
        write_json(new / "state.json", body | {"sha256_state": digest_json(body)})
        size = sum(p.stat().st_size for p in new.iterdir())
        history = json.loads((run / "history.json").read_text()) if (run / "history.json").exists() else []
        entry = {"step": step, "metric": metric, "best": is_best, "metrics": state.get("metrics", {}), "bytes": size, "time": time.time()}
        write_json(run / "history.json", [h for h in history if h["step"] < step] + [entry])
        # Moving `latest` is the last act: killed before it, the run goes on from the older step and does all of this once more. Only the
        # first save has no older step, so its links are there before the folder is.
        for link in ("latest", "best")[: 1 + is_best]:
            if not (run / link).is_symlink():
                point(run / link, name)
        if final.exists():
            os.replace(final, run / f".tmp-{name}-old")
        os.replace(new, final)
        if is_best:
            point(run / "best", name)
        rotate(run, step, keep)
        point(run / "latest", name)
        sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        need = sum(t.nbytes for t in (*weights.values(), *moments.values())) / 1e9
        die(f"{final}: could not be saved ({error}); it needs {need:.2f} GB; earlier checkpoints are untouched, --resume goes on")
    return size


def read_state(folder: Path) -> dict:
    with suppress(OSError, ValueError, KeyError, TypeError):
        body = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if body.pop("sha256_state") == digest_json(body):
            return body
    die(f"{folder}/state.json: damaged or missing; use another step of the run")


def read_tensors(folder: Path, file: str, state: dict) -> dict:
    if not (path := folder / file).is_file() or digest(path) != state["sha256"][file]:
        die(f"{path}: {'damaged: its sha256 is not the one saved' if path.is_file() else 'missing'}; use another step of the run")
    return load_file(path)


def fit(model, weights, where, state=None, way="--init_from"):
    """Names and shapes must agree exactly; else the settings of `state` that differ are named, or the first tensor."""
    own = model.state_dict()
    for name in [*own, *weights]:
        theirs, ours = (tuple(side[name].shape) if name in side else "absent" for side in (weights, own))
        if theirs != ours:
            expect_same(differing(state, model.cfg, SHAPES) if state else (), Path(where).parent, way)
            die(f"{where}: {name} is {theirs} there, {ours} in the model; is it of another architecture, or around other frozen models?")
    return own


def differing(state, cfg, keys=""):
    """[(setting, its value there, here)] of `keys`, or of all by which the same tensors would be another function; a new one is such."""
    there, here, idle = state["config"], configurator.to_dict(cfg), "act" if cfg.ffn == "polyglu" else "acts gate gate_enc gate_block"
    free = f"max_len n_sentinels init_std remat seed gate_noise allow_noncausal {idle} {TENSORS}".split()
    keys = keys.split() or [key for key in ModelConfig.__dataclass_fields__ if key not in free]
    return [(key, there[key], here[key]) for key in keys if key in there and there[key] != here.get(key, there[key])]


def expect_same(other, run, way):
    """`other`: what `differing` found. The settings of both sides are named, and what makes them agree."""
    mine, saved = (", ".join(f"{each[0]}={each[i]}" for each in other) for i in (2, 1))
    not other or die(f"{mine}, but {run} has {saved}: set --{saved.replace(', ', ' --')}, or choose another {way}")


def scatter(value, like):
    """`value` as `like` is: on its device, and sharded if it is."""
    if not hasattr(like, "full_tensor"):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load(path, device="cpu", build=Transformer):
    """-> (the model of that run in eval mode, its state dict). `build` makes a module from a ModelConfig."""
    state = read_state(folder := resolve(path))
    state["config"].get("objective") != "latent" or die(f"{path}: a packet for other models, not one itself: see eval.latent and sample.py")
    mine = {k: v for k, v in state["config"].items() if k in ModelConfig.__dataclass_fields__}
    cfg = configurator.from_dict(ModelConfig, mine, f"{folder}/state.json")
    model, weights = build(cfg), read_tensors(folder, FILES[0], state)
    fit(model, weights, folder / FILES[0])
    model.load_state_dict(weights, assign=True)  # takes the tensors as they are: no second copy of the weights
    model.tau.fill_(state.get("tau", 1.0))
    return model.to(device).eval(), state


def load_weights(path, model):
    """`init_from`: the weights of another run, and nothing else of it. -> a line that says which, and what will be done otherwise."""
    state = read_state(folder := resolve(path))
    put_weights(model, read_tensors(folder, FILES[0], state), folder / FILES[0], state)
    other = ", ".join("{} {} -> {}".format(*each) for each in differing(state, model.cfg))
    return f"started from step {state['step']} of {folder.parent}" + (f"; differs: {other}" if other else "")


def put_weights(model, weights, where, *state):
    with torch.no_grad():  # an edit with parameters of its own may start from older weights: weights = model.state_dict() | weights
        for name, own in fit(model, weights, where, *state).items():
            own.copy_(scatter(weights[name], own))


def load_training(path, model, optimizer) -> dict:
    """Weights, optimizer and random states into the given ones; -> state. What follows equals the uninterrupted run bit for bit."""
    state = read_state(folder := resolve(path, "latest"))
    if other := ", ".join("{} {} -> {}".format(*each) for each in differing(state, model.cfg)):
        die(f"{folder}: resuming would change {other}: leave it as it was, or begin anew with --init_from={folder}")
    if state["optimizer"] != type(optimizer).__name__:
        die(f"{folder}: was trained with {state['optimizer']}; resume with the same --optimizer, or begin anew with --init_from={folder}")
    put_weights(model, read_tensors(folder, FILES[0], state), folder / FILES[0], state, "--out")
    saved, params = read_tensors(folder, FILES[1], state), dict(model.named_parameters())
    state["fp8"] = {key[4:]: saved.pop(key) for key in list(saved) if key.startswith("fp8/")}
    for key in saved:
        name, _, kind = key.rpartition(".")
        if (p := params.get(name)) is None or (saved[key].ndim and saved[key].shape != p.shape):
            die(f"{folder / FILES[1]}: {key} fits no parameter of the model; is it a checkpoint of another architecture?")
        optimizer.state[p][kind] = scatter(saved[key], p) if saved[key].ndim else saved[key].to(p.device)
    with safe_open(folder / FILES[1], "pt") as file:
        set_random_state(file.metadata()["rng"])
    return state
