"""Typed configuration: defaults <- python files <- --key=value. Anything unknown or ill-typed stops with one line.

cfg, files = configurator.load(Config, sys.argv[1:], __doc__) for train.py; configurator.args for every other command.
A config file is plain assignments, run alone, seeing the values so far as bare names; `_private` names are scratch.
Read next: `Config` in train.py, which is what all of it fills."""

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
from contextlib import suppress


def die(msg) -> typing.NoReturn:
    print(" ".join(str(msg).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def coerce(value, kind):
    """`value` as `kind`, or TypeError. Only int -> float and list -> tuple are promoted; a bool is no int."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is typing.Any:  # the untyped inside of a tuple or dict: made equal to what comes back from JSON
        return coerce(value, tuple if isinstance(value, list) else type(value))
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            with suppress(TypeError):
                return coerce(value, option)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [inner[0] if inner else typing.Any] * len(value) if not inner or inner[-1] is ... else inner
        if len(kinds) == len(value):
            return tuple(map(coerce, value, kinds))
    if origin is dict and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: coerce(v, inner[1] if inner else typing.Any) for k, v in value.items()}
    if type(value) is kind or (type(value), value) in [(type(option), option) for option in inner]:  # the latter: Literal
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise TypeError


def assign(values, kinds, key, readings, where):
    """values[key] = the first of `readings` that fits the type of `key`."""
    if key not in kinds:
        die(f"{where}: unknown key '{key}'; did you mean '{difflib.get_close_matches(key, kinds, 1, 0.0)[0]}'?")
    for reading in readings:
        with suppress(TypeError):
            values[key] = coerce(reading, kinds[key])
            return
    kind = re.sub(r"typing\.|<class '|'>", "", str(kinds[key]))
    die(f"{where}: {key} = {readings[0]!r} is not {kind}")


def literal(text):
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def parse(values, kinds, argv, usage):
    if "--help" in argv:
        print(usage().strip())
        raise SystemExit(0)
    names = [arg.partition("=")[0] for arg in argv]
    for arg, name in zip(argv, names, strict=True):
        key, text = name[2:], arg[len(name) + 1 :]
        if not arg.startswith("--") or names.count(name) > 1:
            die(f"{arg}: " + ("given twice; keep one" if arg.startswith("--") else "settings are written --key=value"))
        readings = [text] if kinds.get(key) is str else [literal(text), text, tuple(text.split(","))]  # --acts=relu,tanh
        assign(values, kinds, key, readings if arg != name else ["latest" if key == "resume" else True], arg)


def load(cls, argv, usage=""):
    """-> (`cls` of defaults <- files <- arguments, the list of files)."""
    kinds, files = typing.get_type_hints(cls), [arg for arg in argv if not arg.startswith("-")]
    values = {f.name: getattr(cls, f.name) for f in dataclasses.fields(cls)}
    for path in files if "--help" not in argv else ():
        space = copy.deepcopy(values)  # even a default dict changed in place must not reach the class
        if not os.path.isfile(path):
            die(f"{path}: no such config file; settings are written --key=value")
        try:
            exec(compile(open(path, encoding="utf-8").read(), path, "exec"), space)  # noqa: S102, SIM115
        except (SyntaxError, NameError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            line = getattr(error, "lineno", 0) or getattr(error.__traceback__.tb_next, "tb_lineno", "?")
            die(f"{path}, line {line}: {type(error).__name__}: {error}")
        for key in [k for k, v in space.items() if k[0] != "_" and not isinstance(v, types.ModuleType)]:
            assign(values, kinds, key, [space[key]], path)

    def describe():  # every key with its default and the comment beside it in the source
        source = "\n".join(inspect.getsource(c) for c in cls.__mro__ if dataclasses.is_dataclass(c))
        rows = re.findall(r"^    (\w+): .*?(?:  # (.*))?$|^    # (.*)$", source, re.MULTILINE)
        keys = [f"  --{k}={getattr(cls, k, '')}".ljust(40) + note if k else f"# {head}" for k, note, head in rows]
        return re.sub(r"(?m)^(  --.*\n)(?=# )", r"\1\n", "\n".join([usage, *keys]))  # a blank line above each heading

    parse(values, kinds, [arg for arg in argv if arg not in files], describe)
    return cls(**values), files


def args(defaults, argv, doc):
    """-> SimpleNamespace. `defaults`: key -> its default, or its type when it is required; None means `str | None`."""
    required = [k for k, v in defaults.items() if isinstance(v, type) or typing.get_origin(v)]
    kinds = {k: v if k in required else str | None if v is None else type(v) for k, v in defaults.items()}
    values = {k: v for k, v in defaults.items() if k not in required}
    keys = [f"  --{k}=" + ("REQUIRED" if k in required else str(v)) for k, v in defaults.items()]
    parse(values, kinds, argv, lambda: "\n".join([doc or "", *keys]))
    for key in [k for k in required if k not in values]:
        die(f"--{key}=VALUE is required; --help lists every key")
    return types.SimpleNamespace(**values)


def to_dict(cfg):
    return json.loads(json.dumps(dataclasses.asdict(cfg)))  # `from_dict` restores an equal object


def from_dict(cls, source, where="saved config"):
    values, kinds = {}, typing.get_type_hints(cls)
    for key, value in source.items():
        assign(values, kinds, key, [value], where)
    return cls(**values)
