"""cpu.c, compiled once for this machine and called on tensors: native.call("swiglu_forward", au, ...).

The library lies beside Python's own compiled files (__pycache__), under a name made of the source, the compiler and the processor.
Without a compiler, or with PRISM_NATIVE=0, `compiled()` says why and the plain formulas run: the same numbers to rounding, slower.
Read next: cpu.c; ops.py, kernels.py and lean.py, which call it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from files import sync

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = "-O3 -march=native -std=gnu11 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
KINDS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
PLAIN = {int, float, type(None)}


@functools.cache
def compiled() -> tuple[ctypes.CDLL | None, str]:
    """-> the library, or None; and why."""
    cc = os.environ.get("CC", "cc")
    if os.environ.get("PRISM_NATIVE") == "0":
        return None, "PRISM_NATIVE=0"
    if platform.system() != "Linux":
        return None, f"cpu.c is not built on {platform.system()}"
    if not (compiler := shutil.which(cc)):
        return None, f"no C compiler ({cc}) found"
    source, features = SOURCE.read_text(), re.findall(r"(?m)^(?:flags|Features)\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    made_of = source, compiler, os.stat(compiler).st_mtime_ns, platform.libc_ver(), FLAGS, features
    name = f"cpu-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    here, home = SOURCE.with_name("__pycache__"), Path.home() / ".cache/prism"
    folder = here if os.access(here if here.exists() else here.parent, os.W_OK) else home  # a read-only install
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(".so", dir=folder)  # processes that begin together each write their own
        os.close(handle)
        done = subprocess.run([compiler, *FLAGS.split(), SOURCE, "-o", part, "-lm"], capture_output=True, text=True)
        if done.returncode:
            os.unlink(part)
            return None, f"{compiler} cannot compile cpu.c: {' '.join(done.stderr.split())[:200]}"
        sync(part)
        os.replace(part, path)
    try:  # the one way to ask whether this system lets it be loaded
        built = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded ({error}); delete it"
    for name, arguments in re.findall(r"(?m)^void (\w+)\(([^)]*)\)", source):
        kinds = [ctypes.c_void_p if "*" in argument else KINDS[argument.split()[0]] for argument in re.split(r",\s+", arguments)]
        getattr(built, name).argtypes, getattr(built, name).restype = kinds, None
    return built, f"compiled by {Path(compiler).name} for this processor"


def fits(x, table=None) -> bool:
    """Whether cpu.c can stand for the plain formula: x in fp32 or bf16 on a CPU that has it, tables in fp32, outside of torch.compile."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)  # not one that stands for memory elsewhere, or for none
    return plain and compiled()[0] is not None and (table is None or table.dtype == torch.float32)


def address(x, name):
    if not (where := x.data_ptr()) and x.numel():
        raise RuntimeError(f"{name}: a tensor without memory of its own (sharded?), which cpu.c would take for none")
    return where


def call(name, like, *tensors):
    """The function `name` of cpu.c, in the dtype of `like`, on as many threads as torch uses. `tensors`, and what numbers it takes, stay
    referred to until C returns: some are temporaries of the caller's."""
    raw = [a if type(a) in PLAIN else address(a, name) for a in tensors]
    getattr(compiled()[0], name)(like.dtype == torch.bfloat16, torch.get_num_threads(), *raw)
