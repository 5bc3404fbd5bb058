"""configurator.py: what is accepted, what dies, and that every death is one line with exit code 2."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import configurator
import prelude

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Base:
    # shape
    n_layer: int = 6  # how deep
    lr: float = 1e-3  # peak, "quoted = sign"
    act: str | tuple[str, ...] = "silu"


@dataclass(frozen=True)
class Config(Base):
    arch: Literal["decoder", "encoder"] = "decoder"
    data: str | dict[str, str] = "data/x"
    acts: tuple[str, ...] = ("relu",)
    betas: tuple[float, float] = (0.9, 0.95)
    stages: tuple[dict, ...] = ()
    mix: dict[str, float] | None = None
    scaling: dict | None = None
    compile: bool = False
    out: str = "out/debug"
    resume: str = ""


def load(*argv):
    return configurator.load(Config, list(argv), "usage: train")[0]


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("--lr=3e-4", "lr", 3e-4),
        ("--lr=1", "lr", 1.0),
        ("--n_layer=-2", "n_layer", -2),
        ("--n_layer=1e3", "n_layer", 1000),
        ("--compile", "compile", True),
        ("--compile=False", "compile", False),
        ("--resume", "resume", "latest"),
        ("--resume=best", "resume", "best"),
        ("--out=a=b=c", "out", "a=b=c"),
        ("--out=12", "out", "12"),
        ("--out=", "out", ""),
        ("--data=dir", "data", "dir"),
        ("--data=7", "data", "7"),
        ("--data={'a': 'x=y'}", "data", {"a": "x=y"}),
        ("--betas=0.8,1", "betas", (0.8, 1.0)),
        ("--betas=[0.8, 0.9]", "betas", (0.8, 0.9)),
        ("--acts=relu,tanh", "acts", ("relu", "tanh")),
        ("--acts=relu", "acts", ("relu",)),
        ("--act=silu", "act", "silu"),
        ("--act=silu,gelu", "act", ("silu", "gelu")),
        ("--stages={'tokens': 8}", "stages", ({"tokens": 8},)),
        ("--acts=()", "acts", ()),
        ("--act=('a', 'b')", "act", ("a", "b")),
        ("--mix={'a': 1}", "mix", {"a": 1.0}),
        ("--mix=None", "mix", None),
        ("--stages=({'tokens': 8, 'mix': {'a': 1}},)", "stages", ({"tokens": 8, "mix": {"a": 1}},)),
        ("--arch=encoder", "arch", "encoder"),
    ],
)
def test_accepts(arg, key, value):
    found = getattr(load(arg), key)
    assert found == value and type(found) is type(value)
    if key == "mix" and value:
        assert type(found["a"]) is float


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("--n_layers=3", ["'n_layers'", "'n_layer'"]),
        ("--learning_rate=3", ["unknown key", "did you mean 'lr'"]),
        ("--zzz=3", ["unknown key 'zzz'; --help lists every key"]),
        ("--a(b=3", ["unknown key 'a(b'"]),
        ("--n_layer=1.5", ["n_layer", "1.5", "int"]),
        ("--n_layer=True", ["n_layer", "int"]),
        ("--n_layer=1e-3", ["0.001 is not int\n"]),
        ("--n_layer=1e999", ["int"]),
        ("--lr=True", ["lr", "float"]),
        ("--lr=fast", ["'fast'", "float"]),
        ("--lr", ["--lr needs a value: write --lr=VALUE\n"]),  # what follows a blank is another argument
        ("--out", ["--out needs a value: write --out=VALUE\n"]),
        ("--compile=1", ["bool"]),
        ("--arch=decodr", ["arch = 'decodr' is not one of decoder, encoder\n"]),
        ("--betas=0.9", ["betas", "tuple[float, float]"]),
        ("--betas=1,2,3", ["betas"]),
        ("--mix={'a': 'b'}", ["mix"]),
        ("--stages=(1, 2)", ["stages"]),
        ("lr=3", ["--key=value"]),
        ("-lr=3", ["--key=value"]),
        ("missing.py", ["missing.py", "no such config file"]),
    ],
)
def test_refuses(dies, arg, words):
    dies(lambda: load(arg), *words)


def test_a_key_given_twice_dies(dies):
    dies(lambda: load("--lr=1", "--lr=2"), "--lr", "twice")


def test_files_see_current_values_and_arguments_win(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("import math\n_depth = 2\nn_layer = n_layer * _depth\nlr = 1\nmix = {'a': 2}\n")
    two.write_text("n_layer = n_layer + 1e0; mix['a'] = 3\nscaling = {'factor': [1, 2]}\n")
    cfg, files = configurator.load(Config, ["--lr=0.5", str(one), str(two), "--compile"])
    assert (cfg.n_layer, cfg.lr, cfg.mix, cfg.compile) == (13, 0.5, {"a": 3.0}, True) and type(cfg.n_layer) is int
    assert files == [str(one), str(two)] and Config().mix is None
    assert cfg.scaling == {"factor": (1, 2)}  # an untyped list is stored as what JSON will give back


def test_a_file_cannot_change_a_default_in_place(tmp_path):
    @dataclass(frozen=True)
    class Nested:
        mix: dict = None

    Nested.mix = {"a": 1}
    (tmp_path / "c.py").write_text("mix['a'] = 2\n")
    assert configurator.load(Nested, [str(tmp_path / "c.py")])[0].mix == {"a": 2} and Nested.mix == {"a": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lrr = 3", ["line 1: unknown key 'lrr'; did you mean 'lr' or '_lrr', as names of your own are written?"]),
        ("_n = 2\n\nn_layer = '6'", ["line 3: n_layer", "int"]),
        ("import os\ndef f(): pass", ["line 2", "did you mean '_f'"]),
        ("for i in range(9): pass", ["line 1", "'_i'"]),
        ("lr = 1\n\nopen('/no/such')", ["line 3", "FileNotFoundError"]),
        ("import json\nlr = json.loads('{')", ["line 2: JSONDecodeError: Expecting property name enclosed in double quotes\n"]),
        ("def _f():\n    return 1 / 0\n\nlr = _f()", ["line 2: ZeroDivisionError"]),
        ("lr = '\0'", ["c.py: SyntaxError"]),
        ("lr = 1\nlr = 1 / 0", ["line 2", "ZeroDivisionError"]),
        ("lr = 1\n\nlr = lrr", ["line 3", "NameError"]),
        ("lr = = 1", ["line 1: SyntaxError: invalid syntax\n"]),
        ("lr = 1\nimport no_such_thing", ["line 2", "ModuleNotFoundError", "no_such_thing"]),
        ("assert n_layer == 7, 'seven'", ["line 1", "AssertionError", "seven"]),
    ],
)
def test_broken_files(tmp_path, dies, text, words):
    path = tmp_path / "c.py"
    path.write_text(text)
    dies(lambda: load(str(path)), "c.py", *words)


def test_json_round_trip():
    cfg = load("--data={'a': 'b'}", "--acts=x,y", "--mix={'a': 0.25}", "--stages=({'seq_len': 8, 'mix': {'a': (1, 2)}},)")
    saved = json.loads(json.dumps(configurator.to_dict(cfg)))
    assert configurator.from_dict(Config, saved) == cfg
    assert isinstance(configurator.to_dict(cfg)["acts"], list)


def test_a_saved_config_with_an_unknown_key_dies(dies):
    dies(lambda: configurator.from_dict(Config, {"n_heads": 3}, "run/config.json"), "run/config.json", "n_heads")


def test_help_lists_every_key_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: train")
    for line in ("--n_layer=6 ", "how deep", "# shape", "--betas=(0.9, 0.95)", 'peak, "quoted = sign"', "--arch=decoder"):
        assert line in text
    assert text.index("--arch") < text.index("--n_layer")  # what is a run's own comes before what it builds on


def test_args(capsys, dies):
    keys = {"ckpt": str, "device": Literal["cpu", "cuda"], "top_k": 0, "temperature": 1.0, "chat": False, "prompt": None}
    opt = configurator.args(keys, ["--ckpt=out/x=1", "--device=cpu", "--temperature=0", "--chat", "--prompt=12"], "doc")
    assert vars(opt) == {"ckpt": "out/x=1", "device": "cpu", "top_k": 0, "temperature": 0.0, "chat": True, "prompt": "12"}
    assert configurator.args({"prompt": None}, [], "").prompt is None
    one = configurator.args({"bits": (32, 16), "lrs": (1.0,)}, ["--bits=16", "--lrs=0.5"], "")
    assert (one.bits, one.lrs) == ((16,), (0.5,))  # numbers, not their text
    for said in ("None", "'a'", "[1, 2]", '"it" "is"'):  # text stays text, also where it looks like Python
        assert configurator.args({"prompt": None}, [f"--prompt={said}"], "").prompt == said
    dies(lambda: configurator.args(keys, ["--ckpt=a"], "doc"), "--device", "required")
    dies(lambda: configurator.args(keys, ["--ckpt=a", "--device=tpu"], "doc"), "tpu", "one of cpu, cuda")
    dies(lambda: configurator.args(keys, ["--topk=3"], "doc"), "topk", "top_k")
    dies(lambda: configurator.args(keys, ["out/run"], "doc"), "out/run")
    dies(lambda: configurator.args({"out": str}, ["--out="], ""), "--out=VALUE is required")  # never the current folder
    counts = {"n": 3, "shots": -1, "seed": 0, "need": int, "share": 0.5}
    assert vars(configurator.args(counts, ["--seed=-2", "--need=0"], "")) == {"n": 3, "shots": -1, "seed": -2, "share": 0.5, "need": 0}
    for arg, words in (("n=-1", "--n=-1 must be 0 or more"), ("shots=-2", "--shots=-2 must"), ("need=-1", "--need=-1 must")):
        dies(lambda arg=arg: configurator.args(counts, ["--need=1"][arg[:4] == "need" :] + [f"--{arg}"], ""), words)
    dies(lambda: configurator.args(counts, ["--need=1", "--share=0"], "", positive="n share"), "--share=0.0 must be above 0")
    with pytest.raises(SystemExit) as stop:
        configurator.args(keys, ["--help"], "what it does")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("what it does") and "--top_k=0" in text and "--ckpt=REQUIRED" in text


# ---- what every command begins with (prelude.py)


def commands():
    """train.py and every other file that can be run, as `python FILE` or `python -m PACKAGE.FILE`."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("eval/*.py")]
    return sorted(str(f.relative_to(ROOT)) for f in files if '__name__ == "__main__"' in f.read_text())


def test_names_of_other_programs_lead_to_ours():
    from train import Config

    ours = {f.name for f in fields(Config)} | {"ckpt", "prompt"}
    for pair in prelude.NAMES.split(","):
        theirs, name = pair.split()
        assert name in ours and theirs not in ours
    meant = {"lerning_rate": "lr", "max_enk": "max_enc", "bacth_size": "tokens_per_step", "optimiser": "optimizer", "outt": "out"}
    assert {word: prelude.nearest(word, ours) for word in meant} == {word: [name] for word, name in meant.items()}
    assert prelude.nearest("dropout", ours) == prelude.nearest("x", ()) == []  # three letters alike are no likeness


def test_help_of_every_command_at_once_and_without_torch():
    """All in one process, since each must do without whatever is not Python's; three of them are also run as a user does."""
    code = """
import contextlib, io, runpy, sys
sys.orig_argv.append("--help")
import prelude
for file in sys.argv[1:]:
    sys.argv, out = [file, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (file, end.code)
    text = out.getvalue()
    assert text.count("\\n") > 4 and "<module" not in text and "object at" not in text, (file, text)
assert not {m for m in sys.modules if m.startswith(("torch", "numpy", "lm_eval")) and not isinstance(sys.modules[m], prelude.Blank)}
"""
    assert len(commands()) > 25
    done = subprocess.run([sys.executable, "-c", code, *commands()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in (["train.py"], ["-m", "eval.harness"], ["-m", "prepare.factqa"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and not done.stderr and "--out=" in done.stdout
        assert after.ru_utime - before.ru_utime < 1, command  # 0.2 s; torch alone is 1.5 s and more


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's OpenMP, which torch brings along on Linux alone")
def test_threads_that_wait_are_told_to_sleep_before_torch_asks():
    """As the library itself says what it was told; who sets a policy of waiting keeps it."""
    bare = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | {"OMP_DISPLAY_ENV": "verbose"}
    evaluation = ["-m", "eval.perplexity", "--ckpt=none"]
    cases = ((["train.py", "none.py"], {}, 3000), (evaluation, {}, 3000), (evaluation, {"OMP_WAIT_POLICY": "passive"}, 0))
    for command, more, count in cases:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=bare | more, capture_output=True, text=True)
        assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr


@pytest.mark.parametrize(
    ("package", "argv", "extra"),
    [
        ("pyarrow", ["prepare/text.py", "--from={tmp}/x.parquet", "--out={tmp}/out", "--tokenizer=bytes", "--workers=2"], "'.[data]'"),
        ("lm_eval", ["eval/harness.py", "--ckpt=x", "--tasks=y"], "'.[eval]'"),
        ("torch", ["sample.py", "--ckpt=x"], "."),
        ("gguf", ["hub.py", "import", "--from={tmp}/x.gguf", "--out={tmp}/out"], "'.[export]'"),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(package, argv, extra, tmp_path):
    for kind in ("parquet", "gguf"):
        (tmp_path / f"x.{kind}").write_bytes(b"PAR1")
    code = f"import prelude, runpy, sys; del sys.argv[0]; sys.modules['{package}'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = [word.format(tmp=tmp_path) for word in argv]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"{package} is not installed: pip install -e {extra}\n", done.stderr


def test_every_foreign_package_stands_in_pyproject():
    known = (ROOT / "pyproject.toml").read_text().replace("-", "_")
    for file in [*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py"), *ROOT.glob("eval/*.py")]:
        for name in re.findall(r"^ *(?:import|from) (\w+)", file.read_text(), re.MULTILINE):
            ours = (ROOT / name).exists() or (ROOT / f"{name}.py").exists()
            assert ours or name in {*sys.stdlib_module_names, "triton"} or f'"{name}' in known, (file, name)


def test_a_closed_pipe_is_no_error():
    for unbuffered in ("", "1"):
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen([sys.executable, "train.py", "--help"], cwd=ROOT, env=env, stdout=-1, stderr=-1) as run:
            run.stdout.close()
            assert run.stderr.read() == b""


def test_a_wrong_path_and_an_interruption_need_no_traceback():
    gone, there = "/no/such: No such file or directory; correct the path\n", "/dev/null: File exists; correct the path\n"
    for code, said in ((2, gone), (2, there), (130, "")):
        what = {gone: "open('/no/such')", there: "import os; os.makedirs('/dev/null', exist_ok=True)", "": "raise KeyboardInterrupt"}[said]
        done = subprocess.run([sys.executable, "-c", f"import prelude; {what}"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, said)


def test_an_interruption_that_an_import_would_swallow(tmp_path):
    swallow = "import os\ntry:\n    os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt:\n    pass\nraise ImportError"
    (tmp_path / "torch.py").write_text(swallow)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}"}
    for argv in (["sample.py", "--ckpt=x"], ["-m", "eval.perplexity", "--ckpt=x"]):
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # where the tests run in the background it is ignored
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, preexec_fn=heard)
        assert (done.returncode, done.stderr) == (130, "")
    code = "import prelude\ntry:\n    import torch\nexcept ImportError:\n    print('told')"  # a script of somebody else's
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True).stdout == "told\n"


def test_other_errors_keep_their_traceback():
    done = subprocess.run([sys.executable, "-c", "import prelude; import no_such_thing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no_such_thing" in done.stderr
