"""What every command begins with, before any other import: --help at once, a missing package in one line, pipes that just work.

    import prelude      the first line of train.py, sample.py, hub.py, bench.py, and of the packages prepare and eval

torch takes a second and more to import, and --help needs nothing of it: then whatever is neither Python's nor ours is stood in for.
An error that no line of ours caused keeps its traceback. Read next: configurator.py.
"""

import ast
import atexit
import difflib
import errno
import os
import re
import select
import signal
import stat
import sys
import time
import traceback
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
# Threads that wait for one another sleep after microseconds, not milliseconds (of GNU's OpenMP, asked once, as torch is imported): on cores
# that others use, too, a small step takes 2 to 3 times as long and not 65 times; alone, between 0 and 5 % longer (LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:  # which somebody who sets it means
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
NAMES = """learning_rate lr, batch_size tokens_per_step, gradient_accumulation_steps micro_tokens, block_size seq_len, max_iters max_steps,
    n_embd d_model, dim d_model, hidden_size d_model, grad_clip clip, model ckpt, start prompt"""  # in other programs, and here


def die(msg) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)  # torchrun ends us meanwhile if the first rank of the machine stumbled over the same: told once, not by every rank
    print(" ".join(str(msg).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def nearest(word, names):
    """[the one of `names` that `word` was meant to be, by its own spelling or another program's], or []. Of equals that which begins alike;
    what shares a few letters with none is no misspelling."""
    own = dict(map(str.split, NAMES.split(","))) | {name: name for name in names}
    like = {k: difflib.SequenceMatcher(None, k, word).ratio() + len(os.path.commonprefix((k, word))) / 50 for k in own if own[k] in names}
    return [own[k] for k in sorted(like, key=like.get)[-1:] if like[k] > 0.65]


def execute(path, space):
    """A config file, in the names of `space` -> {name: where it is given}. What fails is told by the line of this file that led to it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), path)
        exec(compile(tree, path, "exec"), space)  # noqa: S102
    except (SyntaxError, NameError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
            ImportError, AssertionError, RuntimeError, OSError) as error:  # fmt: skip
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno else []
        die(f"{path}{''.join(f', line {n}' for n in lines[-1:])}: {type(error).__name__}: {getattr(error, 'msg', error)}")
    given = (node for node in ast.walk(tree) if hasattr(node, "lineno") and not isinstance(getattr(node, "ctx", None), ast.Load))
    return {getattr(node, "id", getattr(node, "name", "")): f", line {node.lineno}" for node in given}


class Blank(types.ModuleType):
    """In place of a module, and of anything in it, that is named but never used."""

    __path__ = ()

    def __getattr__(self, name):
        return None if name[:2] == "__" else Blank(name)

    def __call__(self, *args, **keys):
        return args[0] if args and isinstance(args[0], types.FunctionType) else self  # a decorator gives the function back

    def __mro_entries__(self, bases):
        return ()

    def __or__(self, other):
        return self

    __ror__ = __getitem__ = __or__


class Blanks:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and not any((HERE / file).exists() for file in (top, f"{top}.py")):
            return ModuleSpec(name, Blanks, is_package=True)

    @staticmethod
    def create_module(spec):
        return Blank(spec.name)

    @staticmethod
    def exec_module(module):
        pass


def last_words(kind, error, trace):
    if issubclass(kind, BrokenPipeError) and flush("\n"):
        raise SystemExit(1)
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(130)
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        die(f"{error.filename or 'a file that was written'}: {error.strerror}; free the disk or choose another --out; --resume goes on")
    if issubclass(kind, (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)) and error.filename:
        die(f"{error.filename}: {error.strerror}; correct the path")
    if issubclass(kind, MemoryError) or kind.__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # of numpy, GPU, CPU
        less = "a smaller model (--vocab_size, --d_model, --n_layer, --d_ff) or less at once (of training --micro_tokens; else see --help)"
        die(f"out of memory: {str(error).splitlines()[0] if str(error) else kind.__name__}; take {less}")
    top = (getattr(error, "name", None) or "").partition(".")[0]
    listed = re.findall(r"^(\w+) = \[([^]]*)\]", (HERE / "pyproject.toml").read_text(), re.MULTILINE)
    extra = [name for name, packages in listed if re.search(rf'"{top}\W'.replace("_", "[-_]"), packages)]
    if issubclass(kind, ModuleNotFoundError) and extra:
        what = "." if extra[0] == "dependencies" else f"'.[{extra[0]}]'"
        die(f"{top} is not installed: pip install -e {what}")
    sys.__excepthook__(kind, error, trace)


def interrupted(number, frame):
    """Ctrl-C. A module that is being imported may swallow it, or fail at it in words of its own: then the process just ends."""
    while frame and "importlib" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame:
        os._exit(130)
    raise KeyboardInterrupt


def flush(more=""):
    """Whether the reader of our output is gone (`| head -1`); nothing more is written then."""
    try:
        print(end=more, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True


def listen(prompt):
    """--prompt; without it what a pipe or a file brings. An open pipe that stays silent is somebody else's, and is not waited for."""
    if prompt not in (None, "-"):
        return prompt
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a log may hold a name in another encoding
    kind = os.fstat(0).st_mode if sys.stdin else 0
    comes = (prompt and sys.stdin) or stat.S_ISREG(kind) or (stat.S_ISFIFO(kind) and select.select([0], [], [], 2.0)[0])
    return sys.stdin.read() if comes else ""


program = next((arg for arg in sys.orig_argv[1:] if arg[0] != "-"), "")  # in a script that imports us, --help and Ctrl-C are its own
module = re.match(r"(prepare|eval|hub)\b", program)
if module or Path(program).resolve().parent in (HERE, HERE / "prepare", HERE / "eval"):
    if {"--help", "-h"} & set(sys.orig_argv):
        sys.meta_path.insert(0, Blanks)
    if (module or os.path.isfile(program)) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as behind `&`
        signal.signal(signal.SIGINT, interrupted)
sys.excepthook = last_words
atexit.register(flush)
