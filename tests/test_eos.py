"""An encoder-decoder's texts end with what its source's release calls EOS, wherever they are made, read, written or exported."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import contrast
import denoise_stream as S
import hub
import sample
import tokenizer
import train
from model import Embedder, flat, pool
from prepare import chat, encdec, prompts, sentence, text
from tests.test_denoise_stream import plan_of, write_shards
from tests.test_sample import Script

transformers = pytest.importorskip("transformers", reason="pip install -e '.[export]': transformers writes the folder that is begun from")
DOC, TURN = 256, 258  # what ends a document, and what ends a turn
TUNE = """--arch=encdec --objective=denoise --vocab_size=320 --n_sentinels=20 --n_layer=2 --n_head=4 --n_kv_head=2 --d_model=48
    --head_dim=16 --d_ff=80 --max_len=256 --rope_theta=1e6 --max_enc=64 --max_dec=48 --tokens_per_step=512 --warmup=1 --eval_tokens=512
    --device=cpu --dtype=float32 --lr=1e-3""".split()


def released(folder, named=None, **config):
    """A random Qwen3 folder; `named`: the EOS of its tokenizer_config.json."""
    sizes = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(5)
    theirs = transformers.Qwen3Config(
        **sizes, head_dim=16, max_position_embeddings=256, rope_theta=1e6, tie_word_embeddings=True, initializer_range=0.1, **config
    )
    transformers.Qwen3ForCausalLM(theirs).save_pretrained(folder)
    letters = {c: i for i, c in enumerate(tokenizer.byte_alphabet())}
    marks = {"<|endoftext|>": DOC, "<|im_start|>": 257, "<|im_end|>": TURN}
    (folder / "tokenizer.json").write_bytes(tokenizer.bpe(letters, [], tokenizer.QWEN, marks, nfc=True))
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named, "chat_template": chat.CHATML}))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The instruct release, its encoder-decoder, and shards in the release's own tokenizer, which knows nothing of encoder-decoders."""
    home = tmp_path_factory.mktemp("eos")
    released(home / "hf", "<|im_end|>", eos_token_id=[TURN, DOC])
    encdec.main([f"--from={home / 'hf'}", f"--out={home / 'init'}", "--num_sentinels=20", "--verify"])
    lines = [f"Line {i} says that {i} and {i} make {2 * i}, which anybody can check by counting." * 3 for i in range(60)]
    (home / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    text.main([f"--from={home / 'text.jsonl'}", f"--out={home / 'text'}", f"--tokenizer={home / 'hf'}", "--val=0.1", "--workers=1"])
    return home


def tune(home, out, *more):
    train.main([*TUNE, f"--data={home / 'text'}", f"--out={out}", *more])
    return load_file(checkpoint.resolve(out, "latest") / "model.safetensors")


def said(run):
    return checkpoint.read_state(checkpoint.resolve(run, "latest"))["config"].get("eos_id", "not a word")


def of_old(run, out):
    """A copy of a run as it was saved before its config held an EOS."""
    shutil.copytree(run, out, symlinks=True)
    for file in out.glob("step-*/state.json"):
        body = json.loads(file.read_text())
        del body["config"]["eos_id"], body["sha256_state"]
        file.write_text(json.dumps(body | {"sha256_state": checkpoint.digest_json(body)}))
    return out


def config_of(run, **changes):
    """The settings of a run as its stream reads them."""
    return SimpleNamespace(**checkpoint.read_state(checkpoint.resolve(run, "latest"))["config"] | changes)


def ends(cfg):
    """{last id of either side} over two steps of a stream; also: nothing but lengths says where an example ends."""
    found, plan = set(), plan_of(1024, 1)
    stream = S.DenoiseStream(cfg, plan, log=lambda line: None)
    for packs in (next(stream), next(stream)):
        for pack in packs:
            assert (pack["targets"] != -100).all()  # every target counts, EOS and whatever equals it too
            for ids, cu in (("ids", "cu"), ("targets", "dec_cu")):
                found |= set(pack[ids][pack[cu][1:].long() - 1].tolist())
            assert set(pack["dec_ids"][pack["dec_cu"][:-1].long()].tolist()) == {DOC}  # where the decoder starts is another matter
    return found


@pytest.mark.parametrize(
    ("named", "config", "want"),
    [
        ("<|im_end|>", {"eos_token_id": DOC}, TURN),  # a Llama names several in its config.json, and the turn's in its tokenizer
        ("<|endoftext|>", {"eos_token_id": DOC}, DOC),  # a Base
        (None, {"eos_token_id": TURN}, TURN),
        (None, {"eos_token_id": [TURN, DOC]}, TURN),
        (None, {"eos_token_id": 5}, DOC),  # a default that nobody meant: 5 is a byte
        ("<|nowhere|>", {}, DOC),
    ],
)
def test_what_the_release_says_goes_into_the_config(tmp_path, named, config, want):
    folder, run = released(tmp_path / "hf", named, **config), tmp_path / "run"
    encdec.main([f"--from={folder}", f"--out={run}", "--num_sentinels=20"])
    assert said(run) == want == json.loads((run / "init.json").read_text())["eos"]
    model, _ = checkpoint.load(run)
    assert S.special_of(model.cfg, tokenizer.load(run))[:2] == (DOC, want)


def test_a_run_takes_it_from_its_start_and_keeps_it(home, tmp_path, dies):
    """No config file says it; shards end documents as they did; resumed, the run goes on to the bit, and no other EOS is taken for it."""
    whole = tune(home, tmp_path / "whole", f"--init_from={home / 'init'}", "--max_steps=4", "--save_every=2", "--keep=0")
    assert said(tmp_path / "whole") == TURN and ends(config_of(tmp_path / "whole")) == {TURN}
    ids = np.fromfile(next((home / "text").glob("train-*.bin")), np.uint32)
    assert ids[-1] == DOC and TURN not in ids
    half = [f"--resume={tmp_path / 'whole' / 'step-000002'}", "--max_steps=4"]
    dies(lambda: tune(home, tmp_path / "other", *half, f"--eos_id={DOC}"), "eos_id", str(TURN))
    again = tune(home, tmp_path / "half", *half)  # without init_from: the checkpoint says it
    assert said(tmp_path / "half") == TURN and all(torch.equal(again[name], whole[name]) for name in whole)
    tune(home, tmp_path / "asked", f"--init_from={home / 'init'}", "--max_steps=1", f"--eos_id={DOC}")
    assert said(tmp_path / "asked") == DOC and ends(config_of(tmp_path / "asked")) == {DOC}
    dies(lambda: tune(home, tmp_path / "odd", f"--init_from={home / 'init'}", "--max_steps=1", "--eos_id=5"), "eos_id=5", str(DOC))


def test_an_older_run_goes_on_with_what_it_had(home, tmp_path):
    init = of_old(home / "init", tmp_path / "init")
    whole = tune(home, tmp_path / "whole", f"--init_from={init}", "--max_steps=4", "--save_every=2", "--keep=0")
    assert said(tmp_path / "whole") is None and ends(config_of(tmp_path / "whole")) == {DOC}
    old = of_old(tmp_path / "whole", tmp_path / "old")
    assert "eos_id" not in checkpoint.read_state(old / "step-000002")["stream"]["order"]  # the words by which older runs know their stream
    again = tune(home, tmp_path / "again", f"--resume={old / 'step-000002'}", "--max_steps=4")
    assert said(tmp_path / "again") is None and all(torch.equal(again[name], whole[name]) for name in whole)
    model, tok = checkpoint.load(old)[0], tokenizer.load(old)
    assert Embedder(model, tok).rows(["a"]) == [[*tok.encode("a"), DOC]] and prompts.hole_ids(model.cfg, tok, "a")[0][-1] == DOC


def test_nothing_is_cut_masked_or_counted_by_comparing_with_it(home, tmp_path):
    """Texts made of nothing but EOS and padding are texts of their length: to the stream, to the loss and to the pools."""
    tok, docs = tokenizer.load(home / "hf"), [[TURN, DOC] * 40, [TURN] * 70, [DOC] * 50]
    write_shards(tmp_path / "odd", {"train": docs}, tok)
    cfg = config_of(home / "init", data=str(tmp_path / "odd"), max_enc=64, max_dec=48, seed=1, compile=False, closing_sentinel=False,
                    length_adaptive=False, snap=False, mixture="recommended", mixture_end=None, mode_tokens=True)  # fmt: skip
    assert ends(cfg) == {TURN}
    (pack,) = next(S.DenoiseStream(cfg, plan_of(1024, 1), log=lambda line: None))
    model, _ = checkpoint.load(home / "init")
    loss, each = model.nll(model(pack), pack["targets"])
    assert (each > 0).all() and len(each) == len(pack["targets"]) and torch.isclose(each.double().sum(), loss.detach().double())
    rows = [[TURN, DOC, TURN], [TURN]]
    batch = flat(rows)
    with torch.no_grad():
        hidden = model.encode(batch)
    want = torch.nn.functional.normalize(torch.stack([hidden[:3].mean(0), hidden[3]]), dim=-1)
    torch.testing.assert_close(pool(hidden, batch), want)


@pytest.mark.parametrize("kind", ["pairs", "crops"])
def test_pairs_end_with_it_as_what_they_are_compared_with_will(home, tmp_path, kind):
    rows = [{"query": f"twice {i}", "positive": f"{2 * i} it is", "negatives": ["none"]} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = str(tmp_path / "pairs.jsonl" if kind == "pairs" else home / "text")
    for eos, want in ((TURN, TURN), (None, DOC)):
        cfg = train.Config(arch="encdec", objective="contrast", vocab_size=320, n_sentinels=20, data=data, init_from=str(home / "init"),
                           contrast_pairs=4, contrast_micro=4, max_enc=64, eos_id=eos)  # fmt: skip
        (batch,) = next(stream := contrast.PairStream(cfg, SimpleNamespace(steps=1), 0, 1))
        assert (f"eos_id={TURN}" in stream.order) == (eos == TURN)  # or a run from before there was an eos_id could go on with another
        assert set(batch["ids"][batch["cu"][1:].long() - 1].tolist()) == {want}


def test_it_is_what_a_text_stops_at(home, tmp_path, monkeypatch):
    """Also where no tokenizer_config.json names it; the document's own end is no longer drawn."""
    encdec.main([f"--from={released(tmp_path / 'hf', eos_token_id=TURN)}", f"--out={tmp_path / 'run'}", "--num_sentinels=20"])
    for run in (home / "init", tmp_path / "run"):
        (model, _), tok = checkpoint.load(run), tokenizer.load(run)
        enc, dec, may = prompts.hole_ids(model.cfg, tok, "ab")
        assert enc[-1] == TURN and dec[0] == DOC and TURN in may and DOC not in may
        with monkeypatch.context() as patch:
            Script(patch, [*tok.encode("more"), TURN, *tok.encode("never")])
            assert sample.generate(model, tok, "a") == "more"


def test_it_is_exported_and_comes_back(home, tmp_path):
    pytest.importorskip("sentence_transformers")
    more = ["--to=sentence-transformers", "--max_seq_length=64"]
    hub.main(["export", f"--ckpt={home / 'init'}", f"--out={tmp_path / 'one'}", *more, "--verify"])
    config, texts = json.loads((tmp_path / "one" / "config.json").read_text()), ["one text", "", "another <|im_end|>", "x" * 90]
    assert (config["eos_token_id"], config["pad_token_id"]) == (TURN, DOC)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "one"), Embedder.load(home / "init", max_length=64)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    rows = theirs(texts, truncation=True, max_length=64)["input_ids"]
    assert rows == ours.rows(texts) == Embedder.load(tmp_path / "one").rows(texts) and {row[-1] for row in rows} == {TURN}
    hub.main(["import", f"--from={tmp_path / 'one'}", f"--out={tmp_path / 'run'}"])
    hub.main(["export", f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'two'}", *more])
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    sentence.main([f"--ckpt={home / 'init'}", f"--out={tmp_path / 'plain'}", "--to=transformers"])
    assert Embedder.load(tmp_path / "plain").rows(["a"]) == ours.rows(["a"])
