"""cpu.c, compiled once for this machine and called on tensors: native.call("swiglu_forward", au, ...).

The library lies beside Python's own compiled files (__pycache__), under a name made of the source, the compiler and the processor.
Without a compiler, or with PRISM_NATIVE=0, `library()` says why and the plain formulas run: the same numbers to rounding, slower.
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

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = "-O3 -march=native -std=gnu11 -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
KINDS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """-> the library, or None; and why."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("PRISM_NATIVE") == "0":
        return None, "PRISM_NATIVE=0"
    if platform.system() != "Linux" or not compiler:
        return None, "no C compiler (cc) found" if platform.system() == "Linux" else f"cpu.c is not built on {platform.system()}"
    source, features = SOURCE.read_text(), re.findall(r"(?m)^(?:flags|Features)\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    name = hashlib.sha256(f"{source} {compiler} {FLAGS} {features}".encode()).hexdigest()[:16]
    path = SOURCE.with_name("__pycache__") / f"cpu-{name}.so"
    if not path.exists():
        if not os.access(SOURCE.parent, os.W_OK):
            path = Path(tempfile.mkdtemp()) / path.name
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # processes that begin together each write their own
        done = subprocess.run([compiler, *FLAGS.split(), SOURCE, "-o", part, "-lm"], capture_output=True, text=True)
        if done.returncode:
            return None, f"{compiler} cannot compile cpu.c: {' '.join(done.stderr.split())[:200]}"
        part.replace(path)
    built = ctypes.CDLL(str(path))
    for name, arguments in re.findall(r"(?m)^void (\w+)\(([^)]*)\)", source):
        kinds = [ctypes.c_void_p if "*" in argument else KINDS[argument.split()[0]] for argument in re.split(r",\s+", arguments)]
        getattr(built, name).argtypes, getattr(built, name).restype = kinds, None
    return built, f"compiled by {Path(compiler).name} for this processor"


def fits(x, table=None) -> bool:
    """Whether cpu.c can stand for the plain formula: x in fp32 or bf16 on a CPU that has it, tables in fp32, outside of torch.compile."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return library()[0] is not None and (table is None or table.dtype == torch.float32)


def call(name, like, *arguments):
    """The function `name` of cpu.c, in the dtype of `like`, on as many threads as torch uses."""
    arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(library()[0], name)(like.dtype == torch.bfloat16, torch.get_num_threads(), *arguments)
