"""Files that are whole or absent: written beside their final name, synced to the disk, renamed; and folders that one process holds.
Read next: checkpoint.py."""

import fcntl
import json
import os
import weakref
from contextlib import suppress
from pathlib import Path

from prelude import die


def sync(path):
    """A rename survives a power cut only if the file, and the folder that names it, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


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


def lock(folder):
    """Hold a folder, made if need be, until what is returned goes or the process ends; a second holder is refused."""
    path, made = Path(os.path.realpath(folder)) / ".lock", False
    if not path.parent.parent.exists():
        os.makedirs(path.parent.parent, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            path.parent.mkdir()
            made = not sync(path.parent.parent)
        with suppress(FileNotFoundError):  # `leave` of another process took the folder, or the file that we have just locked: once more
            handle = open(path, "a+")  # noqa: SIM115
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                die(f"{folder}: process {handle.read().strip() or 'another'} is training here; wait for it or choose another --out")
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                break
    handle.truncate(0)
    print(os.getpid(), end="", file=handle, flush=True)
    weakref.finalize(handle, leave, path, made, os.dup(handle.fileno()))  # the second descriptor holds the lock until the end of it
    return handle


def leave(path, made, held):
    """Where nothing was written, as by a run that was refused, nothing is left."""
    with suppress(OSError):
        if os.listdir(path.parent) == [path.name]:
            path.unlink()
            if made:
                path.parent.rmdir()
    os.close(held)
