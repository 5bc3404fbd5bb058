"""Where text comes from: local txt, jsonl, parquet and arrow files, Python's own standard library, or a streamed hub dataset.

`tasks` cuts the input into pieces of about CHUNK bytes, always the same ones, that any number of processes can work on; `rows` and
`documents` read one task. Bytes that are not UTF-8 become U+FFFD and the document counts as "repaired"; a line that is no JSON object
and a file with a zero byte in its first kilobyte are skipped and counted. Read next: prepare/shards.py, which runs the tasks."""

import contextlib
import csv
import glob
import gzip
import io
import json
import mmap
import os
import re
import sysconfig
import zlib
from pathlib import Path

from configurator import die
from prepare.utf8 import decode, repaired, slices, texts, unescape
from tokenizer import LONG, pieces, scalar

CHUNK = 2 << 20  # bytes of input per task
TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz")
LONGEST = 100 << 20  # bytes of a line; a longer one is dropped and counted, so that memory stays below 1 GB


def find(spec, option="from"):
    """Comma-separated globs, folders, or `stdlib` -> [(path, size)], sorted, so that every machine cuts the same tasks."""
    found = {}
    for pattern in spec.split(","):
        if pattern == "stdlib":
            root = sysconfig.get_path("stdlib")
            left_out = r"/(site-packages|dist-packages|tests?|idle_test|__pycache__|encodings)/"  # encodings: megabytes of code tables
            files = [f for f in glob.glob(f"{root}/**/*.py", recursive=True) if not re.search(left_out, f[len(root) :])]
        elif os.path.isdir(pattern):
            files = [os.path.join(d, f) for d, _, names in os.walk(pattern) for f in names if f[0] != "." and not f.endswith(".json")]
        else:
            files = [f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)]
        if not files:
            die(f"--{option}={pattern}: no file there; give a path, a glob in quotes, a folder, or stdlib")
        if packed := [f for f in files if f.endswith((".zst", ".bz2", ".xz", ".zip", ".tar", ".tar.gz", ".tgz"))]:
            die(f"{packed[0]}: unpack it first; text, jsonl (both also .gz), parquet and arrow are read")
        found.update((f, os.path.getsize(f)) for f in files)
    return sorted(found.items())


def tasks(files, column=None, separator=b""):
    """-> (task, bytes of input): runs of whole small files, ranges of lines (or between separators), slices of row groups."""
    small, held = [], 0
    for path, size in files:
        sep = b"\n" if path.endswith(LINES) else separator
        if not path.endswith(TABLES) and not sep:
            small.append(path)
            held += size
        if small and (held >= CHUNK or small[-1] != path):  # the order of documents is the order of files
            yield ("whole", small), held
            small, held = [], 0
        if path.endswith(".parquet"):
            yield from row_groups(path, size, column)
        elif path.endswith(".arrow") or (sep and path.endswith(".gz")):
            yield ("arrow" if path.endswith(".arrow") else "range", path, 0, 0, sep), size
        elif sep and size:
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
                start = 0
                while start < size:
                    cut = view.find(sep, start + CHUNK - 1) if size - start > CHUNK else -1
                    stop = size if cut < 0 else cut + len(sep)
                    yield ("range", path, start, stop, sep), stop - start
                    start = stop
    if small:
        yield ("whole", small), held


@contextlib.contextmanager
def table(path):
    """A parquet file, read page by page, whatever its row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damaged(path, pa.ArrowException, OSError, UnicodeDecodeError):
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as found:
            yield found


@contextlib.contextmanager
def damaged(path, *errors):
    try:
        yield
    except errors as error:
        die(f"{path}: damaged, or not what its name says ({str(error).splitlines()[0][:200]}); copy it again")


def row_groups(path, size, column):
    with table(path) as found:
        meta, names = found.metadata, found.schema_arrow.names
        if column and column not in names:
            die(f"{path}: no column '{column}'; --text_field= one of {', '.join(names)}")
        total = max(1, sum(meta.row_group(g).total_byte_size for g in range(meta.num_row_groups)))
        for g in range(meta.num_row_groups):
            group, share = meta.row_group(g), size * meta.row_group(g).total_byte_size / total
            cuts = min(8, -(-group.total_byte_size // CHUNK))  # a slice re-reads what lies before it: cheap, up to a point
            edges = [group.num_rows * c // cuts for c in range(cuts + 1)]
            for start, stop in zip(edges, edges[1:], strict=False):
                yield ("parquet", path, start, stop, g), share / cuts


def read(path):
    """All rows of one small .jsonl, .json (either gzipped too), .tsv, .csv or .parquet. Only a line feed ends a line of jsonl: U+2028 may
    stand in a string. A quote in a tsv is a quote."""
    path = Path(path)
    if path.suffix == ".parquet":
        with table(path) as found:
            return found.read().to_pylist()
    with damaged(path, ValueError, OSError, EOFError, zlib.error):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text, kind = raw.decode("utf-8"), Path(path.name.removesuffix(".gz")).suffix
        if kind in (".tsv", ".csv"):
            quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            return list(csv.DictReader(io.StringIO(text, newline=""), **quoting))
        return json.loads(text) if kind == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]


def hub(name, config, split, skip):
    """Rows of a dataset streamed from the hub, in tasks; the access token, if one is needed, is HF_TOKEN of the environment."""
    import datasets

    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (ValueError, OSError) as error:
        die(f"--dataset={name} --config={config} --split={split}: {error}")
    batch, held = [], 0
    for row in stream.skip(skip) if skip else stream:
        batch.append(row)
        held += sum(len(v) for v in row.values() if isinstance(v, str)) or 1000
        if held >= CHUNK:
            yield ("given", batch), held
            batch, held = [], 0
    if batch:
        yield ("given", batch), held


@contextlib.contextmanager
def unzipped(path):
    with damaged(path, EOFError, zlib.error, gzip.BadGzipFile):
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb", buffering=1 << 20) as f:
            yield f


def split_range(count, path, start, stop, sep):
    """Texts between separators, as bytes, one at a time."""
    with unzipped(path) as f:
        f.seek(start)
        while sep == b"\n" and (stop == 0 or f.tell() < stop) and (line := [f.readline(LONGEST + 1)])[0]:
            if len(line[0]) <= LONGEST:
                yield line.pop()  # nothing here holds it while it is worked on
                continue
            count[f"lines over {LONGEST >> 20} MB"] += 1
            while line[0] and not line[0].endswith(b"\n"):
                line = [f.readline(1 << 20)]
        if sep == b"\n":
            return
        left = f.read(stop - start if stop else -1)
    at = 0
    while (cut := left.find(sep, at)) >= 0:
        yield left[at:cut]
        at = cut + len(sep)
    if at < len(left):
        yield left[at:]


def rows(task, count, columns=None):
    """Rows of one task as dicts."""
    kind, path, *where = task if task[0] != "given" else (*task, None)
    if kind == "given":
        yield from path
    elif kind == "parquet":
        start, stop, group = where
        with table(path) as found:
            for batch in found.iter_batches(128, row_groups=[group], columns=columns):
                yield from batch.slice(max(0, start), stop - max(0, start)).to_pylist() if start < len(batch) else []
                start, stop = start - len(batch), stop - len(batch)
                if stop <= 0:
                    break
    elif kind == "arrow":
        import pyarrow as pa

        with damaged(path, pa.ArrowException, OSError, UnicodeDecodeError), pa.memory_map(path) as source:
            for batch in pa.ipc.open_stream(source):
                batch.validate(full=True)  # offsets are taken on trust otherwise
                for at in range(0, len(batch), 128):
                    yield from batch.slice(at, 128).to_pylist()
    else:
        for line in split_range(count, path, *where):
            if line.isspace():
                continue
            line = line.decode("ascii", "surrogateescape") if (long := columns and len(line) > LONG) else decode(line)
            row = None
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
            del line
            if isinstance(row, dict):
                yield unescape(row, *columns) if long else row
            else:
                count["not a JSON object"] += 1


def documents(task, count, field):
    """Documents of one task: each an iterable of slices of its text, so that no text need be whole in memory."""
    if task[0] == "whole":
        yield from (blocks(path) for path in task[1] if is_text(path, count))
    elif task[0] == "range" and not task[1].endswith(LINES):
        found = split_range(count, *task[1:]) if is_text(task[1], count, not task[2]) else ()
        yield from (pieces(decode(text).removesuffix("\n" if task[4] == b"\n" else "")) for text in found)
    else:
        for row in rows(task, count, [field]):
            text = row.get(field)
            if isinstance(text, bytes):
                del row
                yield texts(slices(text, 4 * LONG))
            elif isinstance(text, str):
                sound = scalar(text)
                repaired[0] += sound is not text
                del row, text
                yield pieces(sound)
            else:
                count[f"no text in '{field}'"] += 1


def is_text(path, count, first=True):
    """What has a zero byte in its first kilobyte is a picture, an archive or UTF-16, and is counted."""
    with unzipped(path) as f:
        return b"\0" not in f.read(1024) or count.update({"binary file": int(first)})


def blocks(path):
    with unzipped(path) as f:
        yield from texts(iter(lambda: f.read(4 * LONG), b""))
