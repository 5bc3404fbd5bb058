"""README's commands: every one names settings that exist, and the five minutes run as printed, on a small text and a small model."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
import train
from prepare import sentence

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()
COMMANDS = sorted({command for line in LINES for command in re.findall(r"(?:^ {4}|\$ |\| |&& )((?:python|torchrun|make) [^|&]*)", line)})
SMALL = " --n_layer=1 --n_head=2 --n_kv_head=1 --d_model=32 --d_ff=64 --max_steps=2 --eval_every=0 --eval_tokens=512 --warmup=1"


def asked(main, argv):
    """What --help prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    return said.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_exists(command):
    program, *argv = shlex.split(command, comments=True)
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in argv)
        return
    argv = [word for word in argv if not word.startswith("--nproc_per_node")]
    if argv[0] == "train.py":
        cfg, files = configurator.load(train.Config, [w for w in argv[1:] if "$" not in w])  # stops at a key or file that is not there
        assert cfg.out and all((ROOT / file).is_file() for file in files)
        return
    name, rest = (argv[1], argv[2:]) if argv[0] == "-m" else (Path(argv[0]).stem, argv[1:])
    module = importlib.import_module(name)
    if name == "hub":
        text = module.__doc__ + sentence.__doc__
    elif name == "eval.speed":
        text, rest = asked(module.main, []), [w for w in rest if w.startswith("--")]
    else:
        text = asked(module.main, [])
    assert text, command
    keys = [w.partition("=")[0] for w in rest if w.startswith("--")]
    assert all(re.search(rf"{key}\b", text) for key in keys), (keys, text)


def test_the_five_minutes_run_as_printed(tmp_path):
    for path in ROOT.iterdir():  # a checkout of its own, whose out/ and data/ are empty
        if path.suffix in (".py", ".c", ".md") or path.name in ("config", "prepare", "eval"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "my").mkdir()
    for i in range(9):
        (tmp_path / "my" / f"{i}.txt").write_text((ROOT / "model.py").read_text()[i * 4000 : i * 4000 + 40_000])
    (block,) = [block for block in BLOCKS if "--from='my/*.txt'" in block]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in block.splitlines():
        line = line.partition("  #")[0].strip().replace("8192", "300").replace("git log -3", "echo Once").replace("--val=0.05", "--val=0.3")
        line += SMALL * ("train.py" in line) + " --max_new_tokens=4" * ("sample.py" in line)
        if "torchrun" in line:  # ten seconds of start-up; tests/test_faults.py has it
            continue
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)  # noqa: S602
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert (tmp_path / "out/mine/report.html").stat().st_size > 10_000
    (block,) = [block for block in BLOCKS if "from model import Embedder;" in block]
    code = block.replace("out/quickstart", "out/mine").replace("out/RUN", "out/mine").replace("\n    ", "\n").strip()
    code = [sys.executable, "-c", code + "\nprint(tuple(logits.shape), vectors.shape)"]
    done = subprocess.run(code, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert re.fullmatch(r"\(1, \d, 300\) \(2, 32\)\n", done.stdout), (done.stdout, done.stderr[-2000:])
