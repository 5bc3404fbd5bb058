"""Bytes as text, when neither may be trusted: what is no UTF-8 becomes U+FFFD and is counted, what is long is never whole in memory.

One emoji makes Python spend four bytes on every character of a string: a line of 100 MB of JSON becomes 400 MB, and its text as much
again. So where one field of a long line is wanted, prepare/sources.py parses the bytes beyond ASCII as stand-ins of two bytes
("surrogateescape"), and `unescape` makes bytes of that field again, which `texts` decodes slice by slice."""

import codecs

from configurator import die
from tokenizer import LONG, pieces

repaired = [0]  # characters, so far


def decode(raw):
    text = raw.decode("utf-8", "replace")
    if "\ufffd" in text:
        repaired[0] += text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
    return text


def unescaped(text):
    """--separator='\\n\\n' as the bytes that stand in a file."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    except UnicodeError as error:
        die(f"--separator={text}: no text ({error}); write a backslash twice where one is meant")


def slices(raw, size):
    """Bytes in slices of about `size`, cut between characters."""
    start = 0
    while start < len(raw):
        stop = min(start + size, len(raw))
        stop -= next((k for k in range(4) if stop == len(raw) or raw[stop - k] & 0xC0 != 0x80), 0)
        yield raw[start:stop]
        start = stop


def texts(parts):
    """Bytes in parts -> their text in pieces of at most LONG characters."""
    raw, carry = b"", ""
    for part in filter(None, parts):
        *first, raw = slices(raw + part, 4 * LONG - 3)  # the last slice may end within a character
        *whole, carry = pieces(carry + decode(b"".join(first)))
        yield from whole
    yield from pieces(carry + decode(raw))


def unescape(row, field):
    """A row that was parsed with stand-ins -> {field: its text as bytes}; a lone surrogate becomes a byte that is no UTF-8."""
    text = row.pop(field.encode().decode("ascii", "surrogateescape"), None)
    return {field: text.encode("utf-8", "stand-in")} if isinstance(text, str) else row


def stand_in(error):
    part = error.object[error.start : error.end]
    return bytes(ord(c) - 0xDC00 if 0xDC80 <= ord(c) < 0xDD00 else 0xFF for c in part), error.end


codecs.register_error("stand-in", stand_in)
