"""Found where a file of this folder is run by its path, `python prepare/text.py`: Python then looks for modules beside it. From here on
it looks where `python -m prepare.text` does, one folder up. Every such file imports this before others of ours, and gets the real one."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
del sys.modules[__name__]
import configurator  # noqa: E402, F401
