"""Files that are whole or absent: written beside their final name, synced to the disk, renamed; and locks. Read next: checkpoint.py."""

import fcntl
import json
import os
from pathlib import Path

from configurator import die


def sync(path):
    """A rename survives a power cut only if the file, and the folder that names it, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def writable(path):
    """Said before the work whose result goes there, not after it."""
    above = next((folder for folder in Path(path).parents if folder.exists()), Path())
    if path and (os.path.isdir(path) or not above.is_dir()):
        die(f"--out={path}: {'is a folder' if above.is_dir() else f'{above} is no folder'}; name a file")


def write(path, content):
    """Text or bytes; the folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".tmp-{path.name}")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(new)
    os.replace(new, path)
    sync(path.parent)


def write_json(path, value, **how):
    write(path, json.dumps(value, indent=1, **how) + "\n")


def write_rows(path, rows):
    """jsonl"""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def hold(path):
    """The lock of a file, until the process ends; None if another process has it."""
    handle = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return handle
