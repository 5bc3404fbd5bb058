"""Typed configuration: defaults <- python files <- --key=value; anything unknown or ill-typed stops with one line.

    cfg, files = configurator.load(Config, sys.argv[1:], usage=__doc__)          # train.py config/a.py more.py --lr=3e-4
    opt = configurator.args({"ckpt": str, "top_k": 0}, sys.argv[1:], __doc__)    # every other command line

A config file is plain assignments, run alone and seeing the values so far as bare names; `_private` names are scratch.
Files go first, in order, then the arguments. Read next: `Config` in train.py, which is what all of it fills.
"""

import ast
import copy
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import types
import typing


def die(msg) -> typing.NoReturn:
    print(" ".join(str(msg).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def coerce(value, kind):
    """`value` as `kind`, or ValueError. Only int -> float and list -> tuple are promoted; bool is not an int."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return coerce(value, option)
            except ValueError:
                continue
    elif origin is typing.Literal:
        for option in inner:
            if type(option) is type(value) and option == value:
                return value
    elif kind is typing.Any:  # untyped insides of a tuple or dict: what JSON returns must equal what went in
        if isinstance(value, (list, tuple)):
            return coerce(value, tuple)
        return coerce(value, dict) if isinstance(value, dict) else value
    elif (origin or kind) is tuple and isinstance(value, (list, tuple)):
        kinds = inner or (typing.Any, ...)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        if len(kinds) == len(value):
            return tuple(coerce(v, k) for v, k in zip(value, kinds, strict=True))
    elif (origin or kind) is dict and isinstance(value, dict):
        of_key, of_value = inner or (str, typing.Any)
        return {coerce(k, of_key): coerce(v, of_value) for k, v in value.items()}
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind or (kind is None and value is None):
        return value
    raise ValueError(getattr(kind, "__name__", str(kind)) if origin is None else str(kind).replace("typing.", ""))


def assign(values, kinds, key, value, where, text=False):
    """values[key] = value checked; `text`: the value is a string of the command line, still to be read as its type."""
    if key not in kinds:
        near = difflib.get_close_matches(key, list(kinds), 1, 0.0)
        die(f"{where}: unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    candidates = [value]
    if (
        text and kinds[key] is not str
    ):  # a number, tuple, dict or None if it reads as one and fits, else the text itself
        try:
            literal = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
            candidates = [value] if isinstance(literal, str) else [literal, value]
        except (ValueError, SyntaxError):
            candidates.append(tuple(value.split(",")))  # --acts=relu,tanh
    for candidate in candidates:
        try:
            values[key] = coerce(candidate, kinds[key])
            return
        except ValueError as error:
            expected = error
    die(f"{where}: {key} = {value!r} is not {expected}")


def parse(values, kinds, argv, help_text):
    for arg in argv:
        key, has_value, text = arg.removeprefix("--").partition("=")
        if arg in ("--help", "-h"):
            print(help_text())
            raise SystemExit(0)
        if not arg.startswith("--"):
            die(f"{arg}: not understood; settings are written --key=value")
        if sum(other.partition("=")[0] == f"--{key}" for other in argv) > 1:
            die(f"--{key}: given twice; keep one")
        if not has_value and kinds.get(key, bool) is not bool and key != "resume":
            die(f"--{key}: needs a value, --{key}=VALUE")
        assign(values, kinds, key, text if has_value else "latest" if key == "resume" else "True", arg, text=True)


def run_file(values, kinds, path):
    if not os.path.isfile(path):
        die(f"{path}: no such config file")
    space = copy.deepcopy(values)  # a file may even change a default dict in place without touching the class
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), space)
    except (SyntaxError, NameError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        line = getattr(error, "lineno", None) or error.__traceback__.tb_next.tb_lineno
        die(f"{path}, line {line}: {type(error).__name__}: {error}")
    for key, value in space.items():
        if not key.startswith("_") and not isinstance(value, types.ModuleType):
            assign(values, kinds, key, value, path)


def describe(cls, defaults):
    """Every key, its default, and the comment beside it in the source."""
    lines = []
    for owner in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        for line in inspect.getsource(owner).splitlines():
            if field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
                entry = f"  --{field[1]}={defaults.get(field[1])}"
                lines.append(f"{entry:<38}  {field[2] or ''}".rstrip())
            elif heading := re.match(r"    # (.*)", line):
                lines.append(f"\n# {heading[1]}")
    return "\n".join(lines)


def load(cls, argv, usage=""):
    """-> (a `cls` of defaults <- files <- arguments, the list of files)."""
    kinds = typing.get_type_hints(cls)
    values = {
        f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)
    }
    defaults, files = dict(values), [arg for arg in argv if not arg.startswith("-")]
    if not {"--help", "-h"} & set(argv):
        for path in files:
            run_file(values, kinds, path)
    parse(values, kinds, [a for a in argv if a not in files], lambda: f"{usage.strip()}\n\n{describe(cls, defaults)}")
    return cls(**values), files


def args(defaults, argv, doc):
    """-> SimpleNamespace. defaults: key -> default value, or a type when the key is required. None stands for `str | None`."""
    required = {k: v for k, v in defaults.items() if isinstance(v, type) or typing.get_origin(v)}
    kinds = {k: v if k in required else str | None if v is None else type(v) for k, v in defaults.items()}
    values = {k: v for k, v in defaults.items() if k not in required}
    text = lambda: (
        (doc or "").strip()
        + "\n\n"
        + "\n".join(
            f"  --{k}=" + (getattr(v, "__name__", str(v).replace("typing.", "")).upper() if k in required else str(v))
            for k, v in defaults.items()
        )
    )
    parse(values, kinds, argv, text)
    for key in required:
        if key not in values:
            die(f"--{key}=VALUE is required; --help lists every key")
    return types.SimpleNamespace(**values)


def to_dict(cfg):
    """A JSON-able dict; `from_dict` restores an equal object."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def from_dict(cls, source, where="saved config"):
    values, kinds = {}, typing.get_type_hints(cls)
    for key, value in source.items():
        assign(values, kinds, key, value, where)
    return cls(**values)
