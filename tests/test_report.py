"""eval/report.py: one file, no network, every metric drawn; looked at in a real browser where there is one."""

import base64
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from conftest import save_run

from eval import report

pytest.importorskip("matplotlib", reason="pip install prism[plot]: matplotlib draws the pictures")
OPTIONS = SimpleNamespace(samples=0, prompts="", max_new_tokens=8, temperature=0.8, seed=1)


def fake_run(folder, shift=0.0, noncausal=False, lr=1e-3):
    """A run as train.py leaves it: metrics.jsonl and config.json."""
    folder.mkdir()
    suffix = "_noncausal" if noncausal else ""
    lines = []
    for step in range(1, 61):
        row = {
            "step": step,
            f"train/loss{suffix}": 5 - step / 20 + shift,
            "train/lr": lr,
            "train/tokens_per_sec": 1000.0,
            "tokens": step * 64,
        }
        row |= {"train/seq_len": 32 if step < 30 else 64, "train/stage": int(step >= 30), "train/grad_norm": 1.0 + step % 3}
        row |= {"train/peak_mem": 2e9, "train/wait": 0.01, "train/math/loss": 4.0, "train/code/loss": 3.0, "odd/thing": step**0.5}
        lines.append(row)
        if step % 20 == 0:
            lines.append(
                {
                    "step": step,
                    f"val/math/bpb{suffix}": 2.0 + shift,
                    f"val/math/loss{suffix}": 3.0,
                    f"val/mean/loss{suffix}": 3.5 - step / 60,
                }
            )
            lines[-1] |= {"gate_entropy/layer_0": 1.0, "gate_entropy/layer_1": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"config": {"lr": lr, "data": "<script>alert(1)</script>", "n_layer": 2}, "commit": "abc", "torch": "2", "machine": "CPU <b>"}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    base = tmp_path_factory.mktemp("report")
    a, b = fake_run(base / "first"), fake_run(base / "second", 0.3, noncausal=True, lr=2e-3)
    report.main([f"--run={a}", "--samples=0"])
    report.main([f"--run={a},{b}", f"--out={base / 'both.html'}", "--samples=0"])
    return (a / "report.html"), base / "both.html"


def titles(page):
    return re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,[A-Za-z0-9+/=]+">', page.read_text())


def test_every_metric_is_drawn_once(pages):
    wanted = """Training loss|Training loss by tokens seen|Training loss by source|Held-out bits per byte|Held-out loss|Learning rate|\
Sequence length|Stage|Gradient norm before clipping|Throughput|Peak memory|Waiting for data|odd/thing|gate_entropy""".split("|")
    for page in pages:
        found = titles(page)
        assert sorted(found) == sorted(wanted)


def test_nothing_comes_from_elsewhere_and_nothing_is_executed(pages):
    for page in pages:
        text = page.read_text()
        assert not re.search(r"https?://|<script|<link|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
        assert "&lt;script&gt;" in text and "CPU &lt;b&gt;" in text


def test_numbers_and_differences(pages):
    first, both = (page.read_text() for page in pages)
    assert "2.1250 ± 0.0854 (6 values)" in first and "2.5000 at step 60" in first and "2.00 GB" in first and "3,840" in first
    assert "not next-token likelihoods" in both and "not next-token likelihoods" not in first
    differing = both[both.index("<h2>Settings</h2>") : both.index("<details>")]
    assert "0.001" in differing and "0.002" in differing and "n_layer" not in differing and "n_layer" in both


def test_what_was_measured_once_is_a_number_and_no_picture_of_a_dot(tmp_path):
    folder = fake_run(tmp_path / "run")
    rows = (folder / "metrics.jsonl").read_text() + json.dumps({"step": 61, "val/web/once": 0.4375}) + "\n"
    (folder / "metrics.jsonl").write_text(rows)
    report.main([f"--run={folder}", "--samples=0"])
    text = (folder / "report.html").read_text()
    assert "<h2>Measured once</h2>" in text and "<td>val/web/once</td><td>0.4375</td>" in text and "Held out, other" not in text


def test_samples_of_a_real_checkpoint(tmp_path):
    import tokenizer
    from model import ModelConfig, build

    folder = fake_run(tmp_path / "run")
    tokenizer.load("bytes").save(folder / "tokenizer")
    texts = []
    for arch in ("encoder", "decoder"):
        cfg = ModelConfig(arch=arch, n_layer=1, n_head=2, d_model=16, max_len=32)
        save_run(folder, build(cfg), step=60)
        report.main([f"--run={folder}", "--prompts=a<b|def", "--samples=2", "--max_new_tokens=5"])
        texts.append((folder / "report.html").read_text())
    assert "an encoder writes no text" in texts[0] and "<b class=drawn>" not in texts[0]
    assert texts[1].count("<b class=drawn>") == 4 and texts[1].count("<pre>a&lt;b<b") == 2


def test_a_run_that_writes_no_text_has_a_page_too(tmp_path):
    folder = fake_run(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps({"config": {"objective": "latent"}}))
    (folder / "step-000060").mkdir()
    (folder / "step-000060" / "state.json").write_text("{}")
    report.main([f"--run={folder}"])
    assert "<h2>Samples</h2>" not in (folder / "report.html").read_text()


def test_an_encoder_decoder_s_counts_and_shares_lie_apart_and_pairs_are_no_tokens(tmp_path):
    """Token counts, fill and clipping each have an axis of their own; the loss of contrast is per pair, and it writes no text."""
    folder = fake_run(tmp_path / "run")
    more = {
        "train/source_tokens": 3.9e3,
        "train/encoder_tokens": 2.6e3,
        "train/target_tokens": 1.4e3,
        "train/fill": 0.99,
        "train/clipped": 0.1,
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    (folder / "step-000060").mkdir()
    (folder / "step-000060" / "state.json").write_text("{}")
    for objective, unit in (("denoise", "token"), ("contrast", "pair")):
        (folder / "config.json").write_text(json.dumps({"config": {"objective": objective}}))
        report.main([f"--run={folder}"] + ["--samples=0"] * (unit == "token"))
        found = titles(folder / "report.html")
        assert {"Tokens of a step", "How full the packs are", "Clipped gradients"} <= set(found) and "train" not in found
        (first, *_) = re.findall(r'alt="Training loss" src="data:image/svg\+xml;base64,([^"]+)"', (folder / "report.html").read_text())
        assert f"nats per {unit}" in base64.b64decode(first).decode() and "<h2>Samples" not in (folder / "report.html").read_text()


def test_mistakes_end_in_one_line(tmp_path, dies):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    for args, word in (([f"--run={tmp_path / 'gone'}"], "metrics.jsonl"), ([f"--run={tmp_path / 'empty'}"], "is empty"), ([], "--run")):
        dies(lambda: report.main(args), word)


def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no chromium on this machine: apt-get install chromium")


MEASURE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(i => !i.complete || i.naturalWidth < 50 || i.getBoundingClientRect().width < 250).length;
  parent.postMessage("MEASURED " + [innerWidth, document.documentElement.scrollWidth, document.images.length, broken].join(" "), "*");
})</script>"""
FRAME = """<iframe src="page.html" style="width: %dpx; height: 900px; border: 0"></iframe>
<script>addEventListener("message", e => document.body.textContent = e.data)</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 390])
def test_a_browser_shows_every_picture_and_needs_no_sideways_scrolling(pages, width, tmp_path):
    (tmp_path / "page.html").write_text(pages[1].read_text().replace("</body>", MEASURE + "</body>"))
    frame = tmp_path / "frame.html"  # a frame, since a headless window is at least 500 wide
    frame.write_text(FRAME % width)
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    inner, scroll, images, broken = map(int, re.search(r"MEASURED (\d+) (\d+) (\d+) (\d+)", dom).groups())
    assert inner == width and scroll <= inner and images == len(titles(pages[1])) and broken == 0
