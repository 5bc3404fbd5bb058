"""Typed configuration: defaults <- python files <- --key=value; anything unknown or ill-typed stops with one line. `load` fills the Config
of train.py, `args` serves every other command. A config file is plain assignments, run alone, seeing the values so far as bare names;
`_private` names are scratch."""

import ast
import copy
import dataclasses
import inspect
import json
import re
import types
import typing
from contextlib import suppress
from pathlib import Path

from prelude import die, execute, nearest

whole = lambda value: [int(value)] if type(value) is float and value % 1 == 0 else []  # noqa: E731  # 1e9 of a user, where an int is wanted


def coerce(value, kind):
    """`value` as `kind`, or TypeError. Only int -> float and list -> tuple are promoted; a bool is no int."""
    kind = kind if kind is not typing.Any else tuple if isinstance(value, list) else type(value)  # untyped: equal to what JSON gives back
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    value = float(value) if kind is float and type(value) is int else value
    for option in inner if origin in (typing.Union, types.UnionType) else ():
        with suppress(TypeError):
            return coerce(value, option)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner if inner and inner[-1] is not ... else [*inner, typing.Any][:1] * len(value)
        if len(kinds) == len(value):
            return tuple(map(coerce, value, kinds))
    if origin is dict and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: coerce(v, inner[1] if inner else typing.Any) for k, v in value.items()}
    if type(value) is kind or (type(value), value) in [(type(option), option) for option in inner]:  # the latter: Literal
        return value
    raise TypeError


def typed(kinds, key, readings, where):
    """The first of `readings` that fits the type of `key`."""
    if key not in kinds:
        near = [f"'{k}'" for k in nearest(key, kinds)] + [f"'_{key}', as names of your own are written"] * (".py, line " in where)
        die(f"{where}: unknown key '{key}'; " + (f"did you mean {' or '.join(near)}?" if near else "--help lists every key"))
    for reading in readings:
        with suppress(TypeError):
            return coerce(reading, kinds[key])
    kind = re.sub(r"Literal\[(.*?)\]", r"one of \1", re.sub(r"typing\.|<class |'|>", "", str(kinds[key])))
    die(f"{where}: {key} = {readings[0]!r} is not {kind}" if where != f"--{key}" else f"{where} needs a value: write {where}=VALUE")


def parse(values, kinds, argv, usage, rows):
    """values <- --key=value; or, asked for --help, every key with its default and with what `rows` (key, note, heading) say of it."""
    if {"--help", "-h"} & set(argv):
        lines = [f"  --{k}={values.get(k, 'REQUIRED')}".ljust(40) + note if k else f"\n# {head}" for k, note, head in rows]
        print("\n".join([usage.strip(), *map(str.rstrip, lines)]))
        raise SystemExit(0)
    for arg in argv:
        name, equals, text = arg.partition("=")
        if not arg.startswith("--") or sum(name == other.partition("=")[0] for other in argv) > 1:
            die(f"{arg}: " + ("given twice; keep one" if arg.startswith("--") else "settings are written --key=value"))
        readings = [text] if equals else ["latest" if arg == "--resume" else True]
        if equals and kinds.get(name[2:]) not in (str, str | None):  # where text is wanted, 12 stays text
            readings = [text, tuple(text.split(","))][:: -1 if "," in text else 1]  # --act=silu,gelu names two
            with suppress(ValueError, SyntaxError):
                readings = [literal := ast.literal_eval(text), *whole(literal), (literal,), *readings]  # --bits=16 is a tuple of one
        values[name[2:]] = typed(kinds, name[2:], readings, arg)


def load(cls, argv, usage=""):
    """-> (`cls` of defaults <- files <- arguments, the list of files)."""
    kinds, files, wanted = typing.get_type_hints(cls), [arg for arg in argv if not arg.startswith("-")], {"--help", "-h"} & set(argv)
    values = {f.name: getattr(cls, f.name) for f in dataclasses.fields(cls)}
    for path in map(Path, files if not wanted else ()):
        space = copy.deepcopy(values)  # even a default dict changed in place must not reach the class
        path.is_file() or die(f"{path}: no such config file; settings are written --key=value")
        lines = execute(path, space)
        given = {k: v for k, v in space.items() if k[0] != "_" and not isinstance(v, types.ModuleType)}
        values |= {key: typed(kinds, key, [value, *whole(value)], f"{path}{lines.get(key, '')}") for key, value in given.items()}
    source = "\n".join(map(inspect.getsource, filter(dataclasses.is_dataclass, cls.__mro__ if wanted else ())))
    rows = re.findall(r"^    (\w+): .*?(?:  # (.*))?$|^    # (.*)$", source, re.MULTILINE)  # key, the comment beside it, heading
    parse(values, kinds, [arg for arg in argv if arg not in files], usage, rows)
    return cls(**values), files


def args(defaults, argv, doc, positive=""):
    """-> SimpleNamespace. `defaults`: key -> its default, or its type when it is required; None means `str | None`. Only a seed may be
    below 0, and what is so by default; what `positive` names must be above it."""
    values = {k: v for k, v in defaults.items() if not isinstance(v, type) and not typing.get_origin(v)}
    needed = [k for k in defaults if k not in values]
    kinds = defaults | {k: str | None if v is None else type(v) for k, v in values.items()}
    parse(values, kinds, argv, doc or "", [(key, "", "") for key in kinds])
    for key in [k for k in needed if values.get(k, "") == ""]:
        die(f"--{key}=VALUE is required; --help lists every key")
    for key, value in values.items():
        above = key in positive.split()
        if type(value) in (int, float) and key != "seed" and value != defaults[key] and (value < 0 or (above and not value)):
            die(f"--{key}={value} must be {'above 0' if above else '0 or more'}")
    return types.SimpleNamespace(**values)


def to_dict(cfg):
    return json.loads(json.dumps(dataclasses.asdict(cfg)))  # `from_dict` restores an equal object


def from_dict(cls, source, where="saved config"):
    kinds = typing.get_type_hints(cls)
    return cls(**{key: typed(kinds, key, [value], where) for key, value in source.items()})
