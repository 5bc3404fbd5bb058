"""cpu.c, compiled once for this machine and called on tensors: `native.call("swiglu_forward", half, ...)`.

The library lies beside Python's own compiled files (__pycache__), under a name made of the source, the compiler's flags and the
processor. Without a compiler, or with PRISM_NATIVE=0, `why()` says so and the plain formulas run: the same numbers, slower.
Read next: cpu.c; ops.py and kernels.py, which call it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = "-O3 -march=native -std=gnu11 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the library, None if there is none; why)"""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("PRISM_NATIVE") == "0":
        return None, "PRISM_NATIVE=0"
    if platform.system() != "Linux" or not compiler:
        return None, "no C compiler found" if not compiler else f"never tried on {platform.system()}"
    info = Path("/proc/cpuinfo").read_text()
    processor = next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), platform.processor())
    name = hashlib.sha256(f"{SOURCE.read_text()} {compiler} {FLAGS} {processor}".encode()).hexdigest()[:16]
    path = SOURCE.with_name("__pycache__") / f"cpu-{name}.so"
    if not path.exists():
        home = path.parent if os.access(SOURCE.parent, os.W_OK) else Path(tempfile.mkdtemp())
        home.mkdir(exist_ok=True)
        path = home / path.name
        part = path.with_suffix(f".{os.getpid()}")  # several processes may begin at once
        done = subprocess.run([compiler, *FLAGS.split(), SOURCE, "-o", part, "-lm"], capture_output=True, text=True)
        if done.returncode:
            return None, f"{compiler} failed: {' '.join(done.stderr.split())[:200]}"
        part.rename(path)
    return ctypes.CDLL(str(path)), f"compiled by {Path(compiler).name}"


def fits(x, table=None) -> bool:
    """Whether cpu.c can stand for the plain formula: x in fp32 or bf16 on a CPU that has it, tables in fp32, outside of torch.compile."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return library()[0] is not None and (table is None or table.dtype == torch.float32)


def call(name, like, *args):
    """A function of cpu.c in the dtype of `like`: tensors go as pointers, None as no array, ints and floats as they are."""
    getattr(library()[0], name)(like.dtype == torch.bfloat16, torch.get_num_threads(), *map(argument, args))


def argument(value):
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())
