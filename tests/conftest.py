"""What tests share: one thread each (two processes run side by side), and a small corpus in shards."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import checkpoint
import configurator
import native
import tokenizer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """What a test measured, `record_property("figure", text)`, whatever process it ran in."""
    for report in terminalreporter.stats.get("passed", []):
        for kind, text in getattr(report, "user_properties", ()):
            if kind == "figure":
                terminalreporter.write_line(text)


def story(i: int) -> str:
    """A learnable text: the same few sentences with other numbers and names, 200 to 700 characters."""
    names = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald")
    line = "{a} had {x} apples and gave {y} of them to {b}, so {a} has {z} left. "
    lines = [line.format(a=names[(i + j) % 6], b=names[(i * 5 + j + 1) % 6], x=i + j, y=j, z=i) for j in range(3 + i % 7)]
    return "".join(lines).strip()


def save_run(folder, model, tok=None, step=0, **state):
    """A run of `model` as a training leaves it; with `tok` ("bytes", or a tokenizer) it can read text."""
    checkpoint.save(folder, step, model, None, {"config": configurator.to_dict(model.cfg)} | state, keep=1)
    if tok:
        (tokenizer.load(tok) if isinstance(tok, str) else tok).save(os.path.join(folder, "tokenizer"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Shards of 300 stories in bytes; every tenth or so is held out."""
    from prepare import text

    where = tmp_path_factory.mktemp("corpus")
    (where / "stories.txt").write_text("\n\n".join(story(i) for i in range(300)))
    text.main([f"--from={where}/stories.txt", f"--out={where}/shards", "--separator=\\n\\n", "--val=0.1", "--workers=1"])
    return str(where / "shards")


@pytest.fixture
def dies(capsys):
    """dies(call, *words): an error of the user, which is one line on stderr, holding all of the words, and exit code 2."""

    def check(call, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call()
        line, code = capsys.readouterr().err, stop.value.code
        del stop  # its traceback holds what the call did, such as the lock of a folder
        assert code == 2 and line.count("\n") == 1 and all(word in line for word in words), line

    return check


@pytest.fixture(params=["cpu.c", "formula"])
def way(request, monkeypatch):
    """Both ways on a CPU: compiled, and as where no compiler is."""
    if request.param == "cpu.c" and native.compiled()[0] is None:
        pytest.skip(native.compiled()[1])
    if request.param == "formula":
        monkeypatch.setattr(native, "compiled", lambda: (None, "a test"))
    return request.param
