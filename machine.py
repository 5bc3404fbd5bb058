"""What a process runs on: device, dtype and reason, asked of the hardware once; and how a model is spread over processes.

Used by train.py, sample.py, bench.py and eval/. Read next: train.py.
"""

import contextlib
import ctypes
import gc
import os
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import native
from configurator import die


class Machine(NamedTuple):
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of activations
    why: str  # one line, printed
    peak: float  # dense bf16 FLOP/s of the device, 0 when unknown


# dense, without sparsity, from the vendor's data sheets; the first name found in the device's counts, so longer ones come first
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "GB200": 2500e12, "L40S": 362e12, "L40": 181e12}
PEAKS |= {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "L4": 121e12}
PEAKS |= {"RTX 3090": 71e12, "A6000": 155e12, "RTX 6000 Ada": 364e12}


def find(device: str = "auto", dtype: str = "auto") -> Machine:
    if dtype not in ("auto", "float32", "bfloat16"):
        die(f"dtype={dtype} is not known; use auto, float32 or bfloat16")
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cuda(:\d+)?", kind):
        if not torch.cuda.is_available():
            die(f"device={device}, but torch {torch.__version__} sees no GPU; use --device=cpu")
        where = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        if where.index >= torch.cuda.device_count():
            die(f"{where}: there are {torch.cuda.device_count()} GPUs here; start no more processes than that, or choose another --device")
        torch.cuda.set_device(where)
        name, fast = torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where) >= (8, 0)
    elif kind == "cpu":
        library, how = native.compiled()
        name = f"CPU, {torch.get_num_threads()} threads, {'cpu.c ' if library else 'plain formulas: '}{how}"
        where, fast = torch.device("cpu"), cpu_has_bf16()
        keep_freed_memory()
    else:
        die(f"device={device} is not known; use auto, cpu or cuda")
    reason = ("it has" if fast else "it has no") + " bf16 instructions" if dtype == "auto" else "as asked"
    chosen = (torch.bfloat16 if fast else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    why = f"{name}: activations in {str(chosen)[6:]} ({reason})"
    return Machine(rank, world, where, chosen, why, next((v for k, v in PEAKS.items() if k in name), 0.0))


def keep_freed_memory() -> None:
    """Ask glibc to reuse blocks of up to 32 MB: given back, every new activation would be paged in again, 12 % of a step (LOG.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def cpu_has_bf16() -> bool:
    return any(getattr(torch.cpu, ask, bool)() for ask in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def join(machine: Machine) -> None:
    """Meet the other ranks. Control words travel over gloo on the host, gradients over nccl when there are GPUs."""
    if machine.world > 1:
        backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
        # Workers that torchrun restarts meet in the store of the killed ones, where dead addresses still stand: they need names of their
        # own. On several nodes the count of restarts differs: there the store itself has to be a new one.
        here, ask = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"], os.environ.get
        if not here and ask("TORCHELASTIC_USE_AGENT_STORE") == "True" and ask("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            die("--max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (see config/slurm.sh), else no restart comes up")
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT') if here else ''}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def wrap(model, parallel: str, machine: Machine):
    """Data parallel, or fully sharded per block; the loop sees one callable either way."""
    if machine.world == 1:
        return model
    if parallel == "ddp":
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is too young to ask of every torch
        keys = {"gradient_as_bucket_view": True, "broadcast_buffers": False}  # buffers are the same on every rank anyway
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, **keys)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(machine.device.type, (machine.world,))  # gathered in fp32: norms are not to be rounded, Linear casts
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks if stack is not None else ():
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def leave() -> None:
    """Ends the process group, once no wrapped model is left: the last to let go of it waits for its threads, and a wrapper would do so
    with Python's lock in hand, which they may need (LOG.md)."""
    gc.collect()
    dist.destroy_process_group()


def sync_gradients(model, parallel: str, machine: Machine, now: bool) -> None:
    """Reduce gradients in this micro-batch's backward or leave them to the last one; must be said before the forward."""
    if machine.world > 1 and parallel == "ddp":
        model.require_backward_grad_sync = now
    elif machine.world > 1:
        for part in model.modules():  # what is never trained may never be gathered either, and has no gradient to hold back
            if hasattr(part, "set_requires_gradient_sync") and any(p.requires_grad for p in part.parameters()):
                part.set_requires_gradient_sync(now, recurse=False)


def total(values: list[float], machine: Machine) -> list[float]:
    """Sum over ranks, on the host, so that no GPU has to wait."""
    if machine.world == 1:
        return values
    t = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(t)
    return t.tolist()


def gather(value, machine: Machine) -> list:
    """What every rank says, in order."""
    out = [value] * machine.world
    if machine.world > 1:
        dist.all_gather_object(out, value)
    return out


def to_device(batch: dict, device: torch.device) -> dict:
    if device.type == "cpu":
        return batch
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@contextlib.contextmanager
def enough_memory(cfg, row, saved=False):
    """What a forward and backward of this row of the plan do not find room for ends in one line with the remedy; auto_batch takes it.
    saved: this process has left a checkpoint, which is then what to go on from."""
    try:
        yield
    except torch.OutOfMemoryError:
        if cfg.objective == "contrast":
            fits = next((n for n in range(cfg.contrast_micro // 2, 0, -1) if cfg.contrast_micro % n == 0), 0)
            remedy = f"--contrast_micro={fits}" if fits else f"--max_enc={cfg.max_enc // 2}"
            what = f": {cfg.contrast_micro} pairs of texts of up to {cfg.max_enc} tokens per micro-batch"
        else:
            lengths = {stage.get("seq_len", cfg.seq_len) for stage in cfg.stages} | {row.seq_len} if cfg.objective != "denoise" else {1}
            total, half = row.micro_tokens * row.accum, row.micro_tokens // 2
            least = cfg.max_enc + cfg.max_dec if cfg.objective == "denoise" else 0  # what a pack must hold
            fits = next((n for n in range(half, max(least - 1, 0), -1) if total % n == 0 and not any(n % length for length in lengths)), 0)
            fits *= not any(stage.keys() & {"rows", "accum"} for stage in cfg.stages)  # those stages ask for no micro_tokens
            less = "half the rows, twice the accum" if half >= least else "--remat=1" if cfg.remat != 1 else f"--max_enc={cfg.max_enc // 2}"
            remedy = f"--micro_tokens={fits}" if fits else less
            rows = f"{row.micro_tokens // row.seq_len} rows"
            what = f" in stage {row.stage}: L={row.seq_len}, {rows} per micro-batch, precision={cfg.precision}"
        if cfg.auto_batch and fits and os.environ.get("WORLD_SIZE", "1") == "1":
            once_more(f"out of memory{what}", remedy, f"--resume={'auto' if saved else cfg.resume or 'auto'}")
        die(f"out of memory{what}; try {remedy}")


def once_more(why, *settings):
    """This very command with other settings, in this process's place, so that nothing of it still holds memory of the device."""
    names = [setting.partition("=")[0] for setting in settings]
    print(f"{why}; once more, with {settings[0]}", flush=True)
    os.execv(sys.executable, [*(arg for arg in sys.orig_argv if arg.partition("=")[0] not in names), *settings])


def uncompiled():
    """Within it compiled blocks run as written: evaluations and probes come in shapes of their own, each of which would be compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_commit() -> str:
    """The commit of the code that runs, marked when files differ from it; empty outside a checkout."""
    here = Path(__file__).parent
    if not (here / ".git").exists():
        return ""

    def ask(*args):
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True).stdout.strip()

    return ask("rev-parse", "HEAD") + ("-dirty" if ask("status", "--porcelain", "-uno") else "")
