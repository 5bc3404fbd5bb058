import prelude  # isort: skip  # noqa: F401

import os
import sys


def no_bars():
    """transformers' bars, like ours, are for terminals alone; it asks once, when it is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class Checks:
    """Claims, each said as it is found to hold or not; `end` counts them."""

    def __init__(self, name, say=print):
        self.name, self.say, self.good = name, say, []

    def __call__(self, what, holds, note=""):
        self.good.append(bool(holds))
        self.say(f"{'ok  ' if holds else 'FAIL'} {what}{f': {note}' if note else ''}")

    def end(self, more="") -> bool:
        self.say(f"{self.name}: {sum(self.good)} of {len(self.good)} checks hold{more}")
        return all(self.good)
