"""The interlingua: what travels is exact in bytes, losses are those of a hand computation, frozen means bitwise frozen."""

import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_run
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import configurator
import latent_data
import latentwire as lw
import optim
import tokenizer
import train
import wire
from eval import latent
from files import write_rows
from model import ModelConfig, build
from prepare import factqa, prompts

TEXTS = ["Anna Lind lives in Oslo. She has a pet cat.", "Otto Berg lives in Rome. His pet is a dog. He likes figs.", "", "Ωμέγα 🙂", "x"]


# ---- the wire -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 9),
    d=st.integers(0, 70),
    bits=st.sampled_from(wire.WIDTHS),
    seed=st.integers(0, 999),
    power=st.integers(-3, 2),
    outlier=st.booleans(),
)
def test_codec_round_trip_bound_and_size(m, d, bits, seed, power, outlier):
    z = np.random.default_rng(seed).normal(size=(m, d)).astype(np.float32) * 10.0**power
    if outlier and z.size:
        z.flat[0] *= 50
    payload = lw.encode(torch.from_numpy(z), bits)
    back = lw.decode(payload)
    groups = -(-m * d // 32) if bits < 16 else 0
    assert len(payload) == 16 + 2 * groups + math.ceil(m * d * bits / 8) and back.shape == (m, d)
    assert lw.encode(back, bits) == payload or bits < 16
    for i in range(0, m * d, 32):
        error, amax = np.abs(back.numpy().ravel()[i : i + 32] - z.ravel()[i : i + 32]).max(), np.abs(z.ravel()[i : i + 32]).max()
        if bits == 32:
            assert error == 0
        elif bits == 16:
            assert error <= amax * 2**-11 + 2**-25
        else:
            qmax = 2 ** (bits - 1) - 1
            assert error <= amax / (2 * qmax) * (1 + 1e-6) + qmax * 2**-24  # scales below fp16's normal range lose whole steps


@pytest.mark.parametrize("shape, bits, size", [((32, 256), 4, 4624), ((12, 16), 4, 124), ((12, 8), 4, 70), ((4, 16), 4, 52)])
def test_codec_byte_facts(shape, bits, size):
    assert len(lw.encode(torch.randn(shape), bits)) == size


def test_codec_refuses_what_is_not_a_packet():
    good = lw.encode(torch.randn(3, 5), 6)
    for at in (0, 4, 5, 6, 8, 10, 12):  # every field of the header
        bad = bytearray(good)
        bad[at] ^= 0x40
        with pytest.raises(ValueError):
            lw.decode(bytes(bad))
    for bad in (b"", good[:15], good[:-1], good + b"\0"):
        with pytest.raises(ValueError):
            lw.decode(bad)
    for at, byte in ((17, good[17] | 0x80), (18, good[18] | 0xFC), (-1, good[-1] | 1)):  # scale, value, last bit
        bad = bytearray(good)
        bad[at] = byte
        with pytest.raises(ValueError, match="no encoder"):
            lw.decode(bytes(bad))
    nan = bytearray(good)
    nan[16:18] = struct.pack("<e", math.nan)
    with pytest.raises(ValueError, match="finite"):
        lw.decode(bytes(nan))
    for z, bits in (
        (torch.full((1, 1), 1e6), 16),
        (torch.full((1, 1), 1e9), 4),
        (torch.full((1, 1), math.inf), 8),
        (torch.zeros(2), 8),
        (torch.zeros(1, 1), 5),
    ):
        with pytest.raises(ValueError):
            lw.encode(z, bits)


def test_fake_wire_is_the_real_one_with_a_straight_gradient():
    z, cu = torch.randn(7, 24, requires_grad=True), torch.tensor([0, 3, 7], dtype=torch.int32)
    out = lw.over_wire(z, cu, 4)
    assert torch.equal(out[:3], lw.decode(lw.encode(z[:3], 4))) and torch.equal(out[3:], lw.decode(lw.encode(z[3:], 4)))
    out.backward(torch.arange(168.0).view(7, 24))
    assert torch.equal(z.grad, torch.arange(168.0).view(7, 24))


# ---- the losses ---------------------------------------------------------------------------------------------------------


def test_answer_terms_equal_a_hand_computation():
    torch.manual_seed(0)
    logits, teacher = torch.randn(7, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    goal, step = torch.randint(11, (7,)), torch.tensor([0, 1, 2, 3, 0, 1, 2])  # two answers, of 4 and 3 tokens
    got = lw.answer_sums(logits, goal, step, 2, None)
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    ce = [-logp[i, goal[i]].item() for i in range(7)]
    assert got["ans"].item() == pytest.approx(sum(ce))
    assert got["first"].item() == pytest.approx(ce[0] + ce[4])
    assert got["k"].item() == pytest.approx(ce[0] + ce[1] + ce[4] + ce[5])
    one = lw.answer_sums(logits, goal, step, 1)
    assert one["k"].item() == pytest.approx(one["first"].item())  # K = 1 is the first token
    tau, early = 2.0, [0, 1, 4, 5]
    p, q = (teacher[:4] / tau).softmax(-1), (logits[early] / tau).softmax(-1)
    want = tau**2 * sum((p[i] * (p[i] / q[i]).log()).sum().item() for i in range(4))
    assert lw.answer_sums(logits, goal, step, 2, teacher[:4], tau)["kd"].item() == pytest.approx(want)
    assert lw.answer_sums(logits, goal, step, 2, logits[early])["kd"].item() == pytest.approx(0, abs=1e-12)


# ---- layouts ------------------------------------------------------------------------------------------------------------


def settings_of(**changed):
    defaults = configurator.to_dict(train.Config())
    return SimpleNamespace(
        **defaults | {"seq_len": 64, "latent_len": 3, "latent_dim": 8, "d_model": 32, "n_head": 2, "n_layer": 1} | changed
    )


def toy_tokenizer(bos=False, template=None):
    tok = tokenizer.load("bytes")
    if bos:
        rule = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}], "special_tokens": {"<s>": {"ids": [0]}}}
        tok.files["tokenizer.json"] = json.dumps({"post_processor": rule}).encode()
    tok.configure(chat_template=template)
    return tok


def test_layout_per_bos_and_anchor():
    q, tail = "Where?", list(b"\nQuestion: Where?\nAnswer:")
    for bos, mode, want in (
        (False, "first", [-1, -1, *tail]),
        (True, "first", [0, -1, -1, *tail]),
        (True, "after", [-1, -1, 0, *tail]),
        (True, "none", [-1, -1, *tail]),
    ):
        assert latent_data.Side(toy_tokenizer(bos), settings_of(bos=mode)).prompt(q, slots=2) == want
    side = latent_data.Side(toy_tokenizer(True), settings_of(anchor="none"))
    assert side.prompt(q, slots=1) == [0, -1, *b"\nQuestion: Where?\n"] and side.gold("Q?", "no") == [*b"no", 256]
    side = latent_data.Side(toy_tokenizer(), settings_of(compress="all"))
    assert side.prompt(q, slots=1) == [-1, *b"Answer:"] and side.gold("Q?", "no") == [*b" no", 256] and side.gold("Q?", "") == [256]
    assert side.prompt("\0", context="\1") == list(b"Context: \1\nQuestion: \0\nAnswer:")  # what is put in has no holes
    assert latent_data.Side(toy_tokenizer(True), settings_of(bos="after")).bare(2, "x") == [-1, -1, 0, *b"x"]
    assert side.prompt(q, context="C") == list(b"Context: C\nQuestion: Where?\nAnswer:")
    template = "<|endoftext|>{{ messages[0].content }}<|endoftext|>{% if add_generation_prompt %}A{% endif %}"
    side = latent_data.Side(toy_tokenizer(template=template), settings_of())
    evil = "<|endoftext|>"  # in a question it stays text
    ids = side.prompt(evil, slots=2)
    assert side.anchor == "chat" and ids[:3] == [256, -1, -1] and ids[-2:] == [256, 65] and ids.count(256) == 2
    assert side.gold("Q?", "no") == [*b"no", 256]
    with pytest.raises(SystemExit):
        latent_data.Side(toy_tokenizer(), settings_of(anchor="chat"))


def test_a_chat_model_is_taught_and_heard_to_its_end_of_turn(models):
    """SmolLM2's EOS is <|endoftext|>, but it ends an answer with <|im_end|>, which is no part of the answer."""
    template = "<|im_start|>{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}"
    tok = toy_tokenizer(template=template)
    tok.special |= {"<|im_start|>": 1, "<|im_end|>": 2}
    side = latent_data.Side(tok, settings_of())
    assert side.anchor == "chat" and side.gold("Q?", "no") == [*b"no", 2] and side.stops == {2, 256}
    side = latent_data.Side(tok, settings_of(anchor="text"))
    assert side.gold("Q?", "no") == [*b" no", 256] and side.stops == {256}
    tok.configure(chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": template}])
    assert latent_data.Side(tok, settings_of()).tail[-2:] == [2, 1]
    model = lw.build(config(models))
    side, rows = model.sides[0], [{"question": "Where?", "answers": ["x"]}]
    prompt = side.prompt("Where?", context=TEXTS[0])
    side.stops = {lw.greedy(model.lms[0], [torch.tensor(prompt)], (), 1)[0][0]}
    arm = latent.run_arm(model, 0, rows, [prompt], None, True, SimpleNamespace(batch=1, max_new_tokens=4))
    assert arm["text"] == [""]  # nothing was said before the turn ended


def test_a_template_that_closes_turns_with_eos_has_one():
    template = "{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}A{% endif %}"
    assert latent_data.Side(toy_tokenizer(template=template), settings_of()).tail[-2:] == [256, "A"]
    tok = toy_tokenizer(template=template).configure(eos_token={"content": "</s>"}, chat_template=template)
    tok.special["</s>"] = 2
    prompts.release.cache_clear()
    assert latent_data.Side(tok, settings_of()).tail[-2:] == [2, "A"]  # as its tokenizer_config.json names it


def test_targets_are_indexed_once():
    docs = [([5, -1, -1, 7], 0, [8, 9, 256], "ans"), ([-1, 3], 2, [4, 256], "ae"), ([-1], 3, [1], "ans")]
    batch = latent_data.pack(docs)
    assert batch["ids"].tolist() == [5, 0, 0, 7, 8, 9, 0, 3, 4, 0] and batch["cu"].tolist() == [0, 6, 9, 10]
    assert batch["slot_at"].tolist() == [1, 2, 6, 9] and batch["slot_z"].tolist() == [0, 1, 2, 3]
    assert batch["ans.at"].tolist() == [3, 4, 5, 9] and batch["ans.goal"].tolist() == [8, 9, 256, 1]
    assert batch["ans.step"].tolist() == [0, 1, 2, 0] and batch["ae.at"].tolist() == [7, 8]
    for at, goal in zip(batch["ans.at"].tolist()[:2], (8, 9), strict=True):
        assert batch["ids"][at + 1] == goal and batch["ids"][at] != goal  # a target never stands in its own input


def test_alignment_is_refused_not_warned_about():
    side = latent_data.Side(toy_tokenizer(), settings_of())
    assert side.aligned("Q?", "yes")
    merged = side.tok.run  # a tokenizer whose ": y" is one token
    side.tok.run = lambda text: np.array([999 if t == "\x07" else ord(t) for t in text.replace(": y", "\x07")], np.uint32)
    side.short.cache_clear()
    assert not side.aligned("Q?", "yes") and side.aligned("Q?", "no")
    rows = [{"context": "c", "question": "Q?", "answers": [a]} for a in ("yes", "no")]
    kept, dropped = latent_data.sources_of(rows, settings_of(), [side])
    assert dropped == 1 and kept == [("c", [("Q?", "no")])]
    side.tok.run = merged


def test_an_answer_is_what_follows_the_anchor():
    """Llama 2 begins every text with a mark: it stands before the anchor, not before the answer. Of other tokenizers nothing changes."""
    side = latent_data.Side(tok := toy_tokenizer(), settings_of())
    plain, tok.run = tok.run, lambda text: np.array([999, *text.replace(" ", "_").encode()], np.uint32)
    assert side.aligned("Q?", "yes") and side.gold("Q?", "yes") == [*b"_yes", 256] and side.gold("Q?", "") == [256]
    tok.run = plain
    side.short.cache_clear()
    assert side.gold("Q?", "yes") == [*side.ids(" yes"), 256]


def test_slots_pool_the_source_in_order():
    reader = latent_data.Reader(tokenizer.load("bytes"), settings_of(latent_len=3))
    batch = reader.collate([reader.source("abcdefgh"), reader.source("")])  # 9 tokens with EOS, and 1
    pooled = [batch["pool"][batch["pool_to"] == j].tolist() for j in range(6)]
    assert pooled == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9], [9], [9]] and batch["z_cu"].tolist() == [0, 3, 6]
    ragged = latent_data.Reader(tokenizer.load("bytes"), settings_of(latent_ratio=4))
    assert ragged.collate([ragged.source("abcdefgh"), ragged.source("")])["z_cu"].tolist() == [0, 3, 4]
    assert len(reader.source("y" * 100)) == 64 and reader.cut == 1 and reader.fits("y" * 100) == 63 and reader.fits("y" * 9) == 9
    kept = bytes(reader.source("y" * 100, "Where?")[:-1])
    assert len(kept) == 63 and kept.endswith(b"\nQuestion: Where?\nAnswer: ")  # the passage is cut, never the question


# ---- the module ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny readers with different tokenizers and widths, and data to train on."""
    root = tmp_path_factory.mktemp("latent")
    factqa.train_bpe(TEXTS * 9, 300, root / "bpe")
    for name, tok, width, heads in (("a", "bytes", 32, 2), ("b", str(root / "bpe"), 48, 3)):
        tok = tokenizer.load(tok)
        cfg = ModelConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=heads, d_model=width, max_len=256, init_std=0.1, seed=len(name))
        save_run(root / name, build(cfg), tok, tau=1.0)
    rows = [{"context": t, "question": "Where?", "answers": [a], "id": str(i)} for i, (t, a) in enumerate(zip(TEXTS, "abcde", strict=True))]
    write_rows(root / "qa.jsonl", rows)
    write_rows(root / "text.jsonl", [{"text": t * 2} for t in TEXTS[:2]])
    return root


def config(models, **changed):
    return settings_of(lms=(str(models / "a"), str(models / "b")), **changed)


def micro_batch(model, cfg, texts=TEXTS, qa=True, keep=None):
    stream = latent_data.Stream.__new__(latent_data.Stream)
    stream.cfg, stream.sides, stream.reader = cfg, model.sides, model.reader
    chosen = [(t, [("Where?", "Oslo"), ("Who?", "")] if qa else None, 0.5) for t in texts]
    return stream.collate(chosen, keep) | {"bits": 0, "first_k": cfg.first_k, "terms": latent_data.terms_of(cfg)}


def loss_of(model, batch):
    factor, count = lw.weights(model.cfg), lw.counts(batch)
    sums = model(batch)
    assert set(sums) <= set(count) == set(latent_data.terms_of(model.cfg))
    return sum(factor[t] * s / count[t] for t, s in sums.items())


@pytest.mark.parametrize("kind", ["lm", "pool", "byte", "query", "sent"])
def test_every_encoder_trains_and_ignores_batch_mates(models, kind):
    cfg = config(models, latent_encoder=kind, w_kd=1.0, w_ae_qa=0.1, latent_private=1)
    model = lw.build(cfg).set_dtype(torch.float64).double()
    before = [lw.fingerprint(m) for m in model.lms]
    model.adapters.requires_grad_(True)
    batch = micro_batch(model, cfg)
    loss_of(model, batch).backward()
    for name, p in model.named_parameters():
        if p.requires_grad and name != "encoder.reader.embed.weight":
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert [lw.fingerprint(m) for m in model.lms] == before and not any(m.training for m in model.lms)
    assert all(p.grad is None for m in model.lms for p in m.parameters())
    assert not any("lms" in n or n.startswith("readers") for n in model.state_dict())
    model.eval()
    sources = [model.reader.source(t) for t in TEXTS]
    together, alone = model.latents(sources)[0], [model.latents([s])[0][0] for s in sources]
    for a, b in zip(together, alone, strict=True):
        assert a.shape == (3 + 1, 8) and torch.allclose(a, b, atol=1e-6)


def test_private_slots_reach_their_model_alone(models):
    """Ragged packets of shared slots, alike for all, and two more of each model's own, which no other's loss depends on."""
    model = lw.build(cfg := config(models, latent_ratio=9, latent_private=2, w_ae_qa=0.1))
    batch, each = micro_batch(model, cfg), model.latents([model.reader.source(t) for t in TEXTS])
    shared = batch["z_cu"].diff().tolist()
    assert shared[2] == 1 and len(set(shared)) > 2 and [len(z) for z in each[0]] == [m + 2 for m in shared]
    assert all(torch.equal(a[:-2], b[:-2]) and not torch.equal(a[-2:], b[-2:]) for a, b in zip(*each, strict=True))
    assert [len(p) for p in model.sent(each[1], 32)[0]] == [16 + 4 * 8 * (m + 2) for m in shared]  # paid for
    pooled = [batch["own"][batch["own_to"] == j].tolist() for j in range(10)]
    assert sum(pooled[:2], []) == list(range(shared[0])) and pooled[4] == pooled[5] == [sum(shared[:2])]
    sum(v for term, v in model(batch).items() if term.endswith("/1")).backward()
    assert all((p.grad is None) == (m == 0) for m in range(2) for p in model.private[m].parameters())
    short, (payloads, packets) = micro_batch(model, cfg, keep=4), model.sent(each[0], 8, 4)
    assert torch.equal(short["0.slot_z"].unique(), torch.arange(short["packet_cu"][-1])) and short["packet_cu"].diff().max() == 4
    cut = lw.over_wire(model.packets(short)[0], short["packet_cu"], 8)  # what is not sent has no part in the groups of what is
    assert torch.allclose(torch.cat(packets), cut) and len(payloads[0]) == 16 + 2 + 4 * 8
    with pytest.raises(RuntimeError):
        model.load_state_dict(lw.build(config(models, latent_ratio=9)).state_dict())


def test_sequential_gradients_are_the_joint_ones(models):
    grads = []
    for sequential in (False, True):
        cfg = config(models, sequential=sequential, w_kd=0.5, w_ae_qa=0.2, latent_ratio=9, latent_private=2)
        model = lw.build(cfg).set_dtype(torch.float64).double()
        loss_of(model, micro_batch(model, cfg, keep=4)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-12) for n in grads[0])


def test_a_teacher_is_asked_once(models, monkeypatch):
    """Under `sequential` a model's forward is made again in the backward; what its teacher said is remembered."""
    asked, real = [], lw.Interlingua.teacher
    monkeypatch.setattr(lw.Interlingua, "teacher", lambda self, *a: asked.append(1) or real(self, *a))
    model = lw.build(cfg := config(models, sequential=True, w_kd=0.5))
    loss_of(model, micro_batch(model, cfg)).backward()
    assert len(asked) == 2


def test_teacher_stands_at_the_students_place(models):
    """With text in place of the packet the student is the teacher: KL 0, at every one of the first k tokens."""
    cfg = config(models, w_kd=1.0, first_k=3)
    model = lw.build(cfg)
    batch = micro_batch(model, cfg)
    for m, lm in enumerate(model.lms):
        part = {k.removeprefix(f"{m}.teacher."): v for k, v in batch.items() if k.startswith(f"{m}.teacher.")}
        teacher = model.teacher(lm, part)
        side = model.sides[m]
        docs = [(side.prompt(q, context=t), 0, side.gold(q, a), "ans") for t in TEXTS for q, a in (("Where?", "Oslo"), ("Who?", ""))]
        text = latent_data.pack(docs)
        logits = lm.predict(lm(text)[text["ans.at"]])
        early = batch[f"{m}.ans.step"] < 3
        assert torch.equal(text["ans.goal"], batch[f"{m}.ans.goal"]) and torch.equal(part["kd.goal"], text["ans.goal"][early])
        assert lw.answer_sums(logits, text["ans.goal"], text["ans.step"], 3, teacher)["kd"].abs() < 1e-4


def test_softer_targets_reach_the_loss(models):
    """kd_tau is handed to the term that uses it: two temperatures, two losses, each that of the formula on the same logits."""
    found = []
    for kd_tau in (1.0, 3.0):
        model = lw.build(config(models, w_kd=1.0, kd_tau=kd_tau))
        with torch.no_grad():
            found.append(model(micro_batch(model, model.cfg))["kd/0"].item())
    assert found[0] > 0 and abs(found[0] - found[1]) > 2e-5 * found[0]


def test_latent_frozen_trains_only_what_was_put_on_top(models):
    for latent_frozen, latent_blocks in ((True, 1), (False, 1)):
        model = lw.build(config(models, latent_frozen=latent_frozen, latent_blocks=latent_blocks))
        trained = {lw.block_number(n) for n, p in model.encoder.reader.named_parameters() if p.requires_grad and ".blocks." in n}
        assert trained == ({2} if latent_frozen else {0, 1, 2})


def whole(models, **changed):
    return train.Config(**vars(config(models, **changed)))


def saved(out, cfg):
    """A run of `cfg` as train.py leaves it, but for the training."""
    torch.manual_seed(0)
    model = lw.build(cfg)
    checkpoint.save(out, 1, model, None, {"config": vars(cfg) | {"objective": "latent"}}, 1)
    return model


def test_frozen_layers_are_read_where_they_lie(models, tmp_path, dies, monkeypatch):
    """latent_frozen: they are no part of the checkpoint, their hash is; blocks and norm, which are trained, are."""

    def older(state):  # of a run from before a setting was there: its default is what was done
        state["config"].pop("adapter_hidden", None)
        return state

    model = saved(tmp_path / "run", cfg := config(models, latent_frozen=True, latent_blocks=1))
    frozen = {f"encoder.reader.{name}" for name, p in model.encoder.reader.named_parameters() if not p.requires_grad}
    weights = lw.read(tmp_path / "run")[1]
    assert len(frozen) > 9 and not frozen & set(weights) and {"encoder.reader.encoder.norm.weight"} < set(weights)
    assert sum(name.startswith("encoder.reader_sha256_") for name in weights) == 1
    assert any(".blocks.2." in name for name in weights)
    monkeypatch.setattr(checkpoint, "read_state", lambda folder, real=checkpoint.read_state: older(real(folder)))
    again, batch = lw.load(tmp_path / "run")[0], micro_batch(model, cfg)
    assert torch.equal(model.eval().packets(batch)[0], again.packets(batch)[0])
    third = lw.build(whole(models, latent_frozen=True, latent_blocks=1, latent_from=str(tmp_path / "run"), seed=99))  # its own blocks' seed
    third.set_dtype(torch.bfloat16)  # what its checkpoint will hold stays whole
    assert all(torch.equal(value, weights[name]) for name, value in third.state_dict().items() if name.startswith("encoder."))
    lm = lw.frozen(models / "a")
    lm.embed.weight.data[0, 0] += 1
    save_run(tmp_path / "a", lm, tau=1.0)
    (tmp_path / "a" / "tokenizer").symlink_to(models / "a" / "tokenizer")
    other = lw.build(SimpleNamespace(**vars(cfg) | {"latent_reader": str(tmp_path / "a")}))
    dies(lambda: checkpoint.put_weights(other, weights, tmp_path), "around other frozen models")
    wide = lw.build(whole(models, latent_frozen=True, latent_blocks=1, latent_len=cfg.latent_len + 1))
    dies(lambda: checkpoint.load_weights(tmp_path / "run", wide), f"set --latent_len={cfg.latent_len}, or")


def test_an_encoder_is_taken_over_as_it_was_set_up(models, tmp_path, capsys):
    """latent_from: the same tensors under other settings would write other packets; the settings are named."""
    saved(tmp_path / "lm", config(models)), saved(tmp_path / "pool", config(models, latent_encoder="pool", latent_ratio=4, act="silu"))
    (tmp_path / "moved").symlink_to(models / "a")  # the same model in another place, among the run's own or not
    lw.build(whole(models, latent_from=str(tmp_path / "lm"), latent_reader=str(tmp_path / "moved")))
    own = dict(latent_from=str(tmp_path / "lm"), calibration="none", adapter="linear", wire_bits=(4,), first_k=2, seq_len=32)
    lw.build(whole(models, **own))  # how packets are read is this run's own affair
    pool = dict(latent_encoder="pool", latent_ratio=4, latent_from=str(tmp_path / "pool"))
    lw.build(whole(models, **pool))
    for changed, said in (
        ({"latent_frozen": True}, "latent_frozen=True, but {}/lm has latent_frozen=False"),
        ({"compress": "all"}, "compress=all, but {}/lm has compress=context: set --compress=context,"),
        ({"latent_len": 4, "latent_dim": 9}, "latent_dim=9, latent_len=4, but {}/lm has latent_dim=8, latent_len=3: set --latent_dim=8"),
        ({"latent_reader": str(models / "b")}, "latent_reader={m}/b, but {}/lm has latent_reader={m}/a: set --latent_reader={m}/a"),
        (pool | {"n_head": 4}, "n_head=4, but {}/pool has n_head=2"),
        (pool | {"seq_len": 63}, "seq_len=63, but {}/pool has seq_len=64"),
        (pool | {"latent_ratio": 0}, "latent_ratio=0, but {}/pool has latent_ratio=4"),
        ({"latent_from": str(models / "a")}, "{m}/a: a run of objective=lm, not latent"),
    ):
        with pytest.raises(SystemExit):
            lw.build(whole(models, **{"latent_from": str(tmp_path / "lm")} | changed))
        error = capsys.readouterr().err
        assert said.replace("{}", str(tmp_path)).replace("{m}", str(models)) in error and error.count("\n") == 1


def test_a_reader_among_the_frozen_models_is_loaded_once(models, monkeypatch):
    loaded, real = [], lw.frozen
    monkeypatch.setattr(lw, "frozen", lambda path: loaded.append(path[-1]) or real(path))
    lw.build(config(models, latent_reader=str(models / "b")))
    assert loaded == ["a", "b"]


def test_a_reader_keeps_its_own_gate():
    """The layers of an encoder come with the gate they were trained with, those of a decoder with theirs."""
    shape = dict(vocab_size=257, n_layer=1, n_head=2, d_model=16, max_len=32, ffn="polyglu", gate_noise=False)
    for arch, gate in (("encoder", "token"), ("decoder", "static")):
        lm = build(ModelConfig(arch=arch, gate="static", gate_enc="token", **shape))
        lm.tau.fill_(0.25)  # as trained
        assert lw.reader_of(lm, 0, causal=False).cfg.gate_enc == gate
        assert lw.reader_of(lm, 0, causal=False).tau == 0.25


def test_wire_start_and_latent_questions_hold_back(models):
    sides, reader = lw.layouts(config(models))
    keys = dict(data={"qa": str(models / "qa.jsonl")}, seq_len=48, tokens_per_step=96, max_steps=8, objective="latent", wire_bits=(4,))
    for wire_start, first in ((0.0, 0), (0.5, 4)):
        cfg = config(models, wire_start=wire_start, **keys)
        stream = latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print)
        assert [step[0]["bits"] for step in stream] == [0] * first + [4] * (8 - first)
        cfg = config(models, wire_start=wire_start, **keys | {"wire_bits": (), "wire_slots": (1, 2)})
        kept = [step[0]["packet_cu"].diff().unique().tolist() for step in latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader)]
        assert kept[:first] == [[3]] * first and {n for (n,) in kept[first:]} == {1, 2}
    for latent_questions, asked in ((1, 1), (2, 2), (0, 5)):
        stream.cfg = config(models, latent_questions=latent_questions)
        batch = stream.collate([("Anna lives in Oslo.", [(f"Q{i}?", "Oslo") for i in range(5)], 0.5)])
        assert int((batch["0.ans.step"] == 0).sum()) == asked


def test_every_document_reads_its_own_packet(models):
    cfg = config(models, w_ae_qa=0.1)
    model = lw.build(cfg)
    for qa, kinds in ((True, ["ans", "ans", "ae_qa"]), (False, ["ae", "lm"])):
        texts = ["one two three four five six", "a b c d e f g h"]
        batch = micro_batch(model, cfg, texts, qa)
        z = batch["z_cu"].tolist()
        for m in range(2):
            docs, slots = batch[f"{m}.cu"].tolist(), batch[f"{m}.slot_at"].tolist()
            want = [i for i in range(2) for _ in kinds]  # every source's documents, one source after the other
            got = [[int(batch[f"{m}.slot_z"][slots.index(s)]) for s in slots if a <= s < b] for a, b in zip(docs, docs[1:], strict=False)]
            assert got == [list(range(z[i], z[i + 1])) for i in want]


def test_what_follows_a_long_text_follows_what_was_read(models):
    model = lw.build(cfg := config(models))  # seq_len 64; the first model's tokens are bytes
    text = "".join(f"{i:02d} " for i in range(90))
    batch = micro_batch(model, cfg, [text], qa=False)
    read = bytes(batch["ids"][:-1].tolist()).decode()
    assert 0.4 * 63 <= len(read) < 63 and text.startswith(read)
    assert bytes(batch["0.lm.goal"].tolist()).decode() == text[len(read) :][:64] and len(batch["0.ae.goal"]) == len(read) + 1
    batch = micro_batch(model, cfg, ["y" * 90], qa=False)  # no space: what was read is repeated, and nothing follows
    assert len(batch["0.ae.goal"]) == 64 and "0.lm.goal" not in batch and model.reader.cut == 1


def test_nobody_repeats_or_tokenises_what_is_not_read(models, monkeypatch):
    """A passage longer than the encoder takes: what is asked back is what was read. Of a book no more is tokenised than could be read."""
    text = "".join(f"{i:02d} " for i in range(90))
    for compress, question in (("context", "Where?"), ("all", "W?")):
        model = lw.build(cfg := config(models, w_ae_qa=0.1, compress=compress))  # model 1's tokens are longer than the encoder's bytes
        stream = latent_data.Stream.__new__(latent_data.Stream)
        stream.cfg, stream.sides, stream.reader = cfg, model.sides, model.reader
        monkeypatch.setattr(model.sides[1].tok, "run", lambda t: np.arange(len(t) // 4, dtype=np.uint32))
        batch = stream.collate([(text, [(question, "Oslo")], 0.5)])
        read = bytes(batch["ids"][:-1].tolist()).decode().removeprefix("Context: ").split("\nQuestion")[0]
        assert text.startswith(read) and len(read) < 64 and bytes(batch["0.ae_qa.goal"].tolist()[:-1]).decode() == read
        assert len(batch["1.ae_qa.goal"]) == len(read) // 4 + 1
    sizes, real = [], model.reader.tok.run
    monkeypatch.setattr(model.reader.tok, "run", lambda t: sizes.append(len(t)) or real(t))
    assert len(model.reader.source(text[:50])) == 51 and model.reader.fits(text[:50]) == 50 and len(sizes) == 1
    sizes.clear()
    batch = micro_batch(model, config(models), [text * 500], qa=False)
    assert max(sizes) <= 16 * 64 and len(batch["0.lm.goal"]) == 64


def test_only_short_texts_are_kept():
    """Passages would fill the memory; and whatever is kept or not comes back alike."""
    side = latent_data.Side(toy_tokenizer(), settings_of())
    for text in ("Where?", "x" * 257):
        assert side.ids(text) == tuple(text.encode()) and side.ids(text) == side.ids(text)
    assert side.short.cache_info().currsize == 1 and side.aligned("Q" * 300, "yes")
    assert side.gold("Q" * 240, "x" * 30) == [*b" " + b"x" * 30, 256]  # its start is kept, the whole is not


def test_settings_that_nothing_in_the_data_heeds_are_named(models, dies):
    """Text without questions, questions without text, and a length of a stage that would cut nothing."""
    sides, reader = lw.layouts(config(models))
    keys = dict(seq_len=48, tokens_per_step=96, max_steps=8, objective="latent")
    for file, changed, said in (
        ("qa", {"w_ae": 0.3, "w_kd": 1.0}, "w_ae=0.3 (needs text in --data)"),
        ("text", {"w_ae": 0.3, "w_kd": 1.0, "latent_questions": 2}, "w_kd=1.0, latent_questions=2 (needs questions in --data)"),
        ("qa", {}, ""),
    ):
        lines, cfg = [], config(models, data={file: str(models / f"{file}.jsonl")}, **keys, **changed)
        latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, lines.append)
        assert [line for line in lines if "without effect" in line] == [f"data: without effect here: {said}"] * bool(said)
    for length in (24, 48):
        cfg = config(models, data=str(models / "qa.jsonl"), stages=({"start": 0}, {"start": 4, "seq_len": length}), **keys)
        if length == 48:
            latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print)
            continue
        dies(lambda: latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print), "seq_len=24 would cut no source")
    for tokens, stages, said in ((100, (), "2.08333 sources"), (96, ({"start": 0}, {"start": 4, "rows": 3, "accum": 2}), "")):
        cfg = config(models, data=str(models / "qa.jsonl"), stages=stages, **keys | {"tokens_per_step": tokens})
        if not said:
            steps = list(latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print))
            assert [(len(micros), len(micros[0]["z_cu"]) - 1) for micros in steps] == [(1, 2)] * 4 + [(2, 3)] * 4
            continue
        dies(lambda: latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print), said, "tokens_per_step=100", "seq_len=48")


def test_slots_look_like_words(models):
    model = lw.build(config(models, adapter_hidden=20))
    assert [a.net[0].out_features for a in model.adapters] == [20, 20]
    batch = micro_batch(model, model.cfg)
    z, sums, n = model.packets(batch)[0], model(batch), lw.counts(batch)["rms_raw/0"]
    model.adapters[0].gain.data *= 2
    assert n == len(z) and model(batch)["rms_cal/0"].item() == pytest.approx(2 * n * model.adapters[0].words_rms, rel=1e-4)
    assert sums["rms_raw/0"].item() == pytest.approx(sum(row.square().mean().sqrt().item() for row in model.adapters[0].net(z)), rel=1e-4)
    model.adapters[0].gain.data /= 2
    for adapter, lm in zip(model.adapters, model.lms, strict=True):
        words = lm.embed_tokens(torch.arange(lm.cfg.vocab_size))
        assert adapter(z).square().mean().sqrt().item() == pytest.approx(words.square().mean().sqrt().item(), rel=1e-3)


def arguments(models, out, **changed):
    keys = dict(
        objective="latent",
        out=str(out),
        data={"qa": str(models / "qa.jsonl"), "text": str(models / "text.jsonl")},
        lms=(str(models / "a"), str(models / "b")),
        seq_len=48,
        tokens_per_step=192,
        latent_len=3,
        latent_dim=8,
        latent_private=2,
        wire_bits=(8, 4),
        wire_slots=(2, 4, 5),
        stages=({"start": 0, "mix": {"text": 1.0}}, {"start": 3, "mix": {"qa": 0.7, "text": 0.3}}),
        max_steps=6,
        save_every=2,
        keep=9,
        log_every=1,
        warmup=2,
        dtype="float32",
        optimizer="muon",  # the copied reader has other heads than the run's own settings
    )
    return [f"--{k}={v}" for k, v in (keys | changed).items()]


def run_train(models, out, *more, **changed):
    train.main(arguments(models, out, **changed) + list(more))
    return {p.name: (p / "model.safetensors").read_bytes() for p in out.glob("step-*")}


def test_train_resumes_to_the_bit_and_keeps_the_frozen_frozen(models, tmp_path, capsys, dies):
    before = {n: lw.fingerprint(lw.frozen(models / n)) for n in "ab"}
    whole = run_train(models, tmp_path / "one")
    again = run_train(models, tmp_path / "one", f"--resume={tmp_path}/one/step-000002")
    assert again["step-000006"] == whole["step-000006"]
    assert before == {n: lw.fingerprint(lw.frozen(models / n)) for n in "ab"}
    rows = [json.loads(line) for line in open(tmp_path / "one" / "metrics.jsonl")]
    assert {"train/ae/0", "train/lm/1", "train/rms_raw/1"} <= set(rows[0]) and {"train/ans/0", "train/first_right/1"} <= set(rows[-1])
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/lr" in row)  # what eval.plots draws
    assert all(0 < row[f"adapter_grad/{m}"] < math.inf for row in rows for m in range(2) if "train/lr" in row)
    model, state = lw.load(tmp_path / "one")
    assert state["step"] == 6 and not model.training
    other = {**state["config"], "lms": [str(models / "b"), str(models / "a")]}  # readers swapped: refused
    dies(
        lambda: checkpoint.put_weights(lw.Interlingua(SimpleNamespace(**other)), lw.read(tmp_path / "one")[1], "here"),
        "another architecture",
    )
    saved, weights = lw.read(tmp_path / "one")
    for key, was, value in (("adapter_hidden", 0, 9), ("latent_private", 2, 1), ("adapter", "mlp", "linear")):  # no tensor's name alone
        edited = lw.build(configurator.from_dict(train.Config, saved["config"] | {key: value, "wire_slots": [2, 4]}))
        dies(lambda: checkpoint.put_weights(edited, weights, tmp_path / "one/x", saved), f"{key}={value}, but", f"set --{key}={was},")
    size, texts = lw.answers(model, TEXTS[0], "Where?", bits=4, max_new_tokens=4)
    assert size == 16 + 4 + 20 and len(texts) == 2
    third = dict(latent_from=str(tmp_path / "one"), lms=(str(models / "b"),), latent_reader=str(models / "a"))
    joined = run_train(models, tmp_path / "third", save_every=6, **third)
    new, old = lw.read(tmp_path / "third")[1], lw.read(tmp_path / "one")[1]
    assert joined and all(torch.equal(v, old[k]) for k, v in new.items() if k.startswith("encoder."))  # only adapter and own slots moved
    assert new["private.0.out.weight"].shape == old["private.1.out.weight"].shape and not any(k.startswith("private.1") for k in new)
    dies(lambda: lw.build(train.Config(**vars(settings_of(**third, latent_dim=16)))), "latent_dim=16, but")
    train.main(arguments(models, tmp_path / "none", max_steps=8, save_every=0) + ["--benchmark=1"])
    assert capsys.readouterr().out.split()[-4] == "-"  # jsonl has no bytes per token


def test_a_run_around_frozen_layers_resumes_to_the_bit(models, tmp_path):
    keys = dict(latent_frozen=True, latent_blocks=1, max_steps=4, stages=())
    whole = run_train(models, tmp_path / "one", **keys)
    assert run_train(models, tmp_path / "one", f"--resume={tmp_path}/one/step-000002", **keys)["step-000004"] == whole["step-000004"]
    model, weights = lw.load(tmp_path / "one")[0], lw.read(tmp_path / "one")[1]
    layers = {name for name, _ in model.named_parameters() if ".blocks." in name}
    assert {name for name in weights if ".blocks." in name} == {name for name in layers if ".blocks.2." in name}


def test_a_frozen_reader_is_known_by_its_weights(models):
    """It is not saved: a checkpoint must not be read through another model of the same shape."""
    names = []
    for reader in "ab":
        model = lw.build(settings_of(lms=(str(models / "a"),), latent_encoder="sent", latent_reader=str(models / reader)))
        names.append([name for name in model.state_dict() if name.startswith("encoder.reader_sha256_")])
    assert len(names[0]) == len(names[1]) == 1 and names[0] != names[1]


def test_settings_that_contradict_each_other_stop(models):
    for bad in (
        {"lms": ()},
        {"lms": (str(models / "a"), str(models / "a"))},
        {"calibration": "fixed"},
        {"prefix_rms": 1.0},
        {"latent_encoder": "sent", "latent_blocks": 1},
        {"parallel": "fsdp"},
        {"wire_bits": (5,)},
        {"wire_bits": (4,), "wire_start": 1.0},
        {"wire_slots": (2,), "wire_start": 1.0},
        {"wire_slots": (0,)},
        {"wire_slots": (4,)},
        dict.fromkeys("w_ans w_first w_k w_kd w_ae w_lm w_ae_qa".split(), 0.0),
    ):
        with pytest.raises(SystemExit):
            latent_data.check(SimpleNamespace(**vars(config(models)) | bad))


def test_stream_is_the_same_for_any_world(models, dies):
    cfg = config(models, data={"qa": str(models / "qa.jsonl"), "text": str(models / "text.jsonl")}, mix={"qa": 0.5, "text": 0.5},
                 seq_len=48, tokens_per_step=48 * 4, micro_tokens=48, max_steps=9, objective="latent")  # fmt: skip
    sides, reader = lw.layouts(cfg)
    ids = {}
    for world in (1, 2):
        streams = [latent_data.Stream(cfg, optim.Plan(cfg, world), r, world, sides, reader, print) for r in range(world)]
        steps = [[next(s) for s in streams] for _ in range(4)]
        ids[world] = [[m["ids"].tolist() for i in range(4 // world) for m in (rank[i] for rank in step)] for step in steps]
    assert ids[1] == ids[2]
    reader.cut, said = 0, []
    list(latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, said.append))
    assert reader.cut > 1 and sum("longer than seq_len=48" in line for line in said) == 1
    stream = latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print)
    next(stream), next(stream)
    state = json.loads(json.dumps(stream.state))
    want = [m["0.ids"].tolist() for m in next(stream)]
    stream = latent_data.Stream(cfg, optim.Plan(cfg, 1), 0, 1, sides, reader, print)
    stream.load(state)
    assert [m["0.ids"].tolist() for m in next(stream)] == want
    rows = json.loads("[" + ",".join((models / "text.jsonl").read_text().splitlines()) + "]")
    write_rows(models / "other.jsonl", [{"text": row["text"] + "."} for row in rows])  # as many, but others
    other = {"data": {**cfg.data, "text": str(models / "other.jsonl")}}
    for change, was in ((other, "text="), ({"seed": 5}, f"seed={cfg.seed}, not seed=5"), ({"latent_questions": 1}, "latent_questions=")):
        stream = latent_data.Stream(SimpleNamespace(**vars(cfg) | change), stream.plan, 0, 1, sides, reader, print)
        dies(lambda: stream.load(state), f"the checkpoint read {was}")


def test_greedy_by_cache_is_the_argmax_of_whole_forwards(models):
    model = lw.build(config(models))
    for m, lm in enumerate(model.lms):
        side = model.sides[m]
        prompts = [side.prompt("Where?", context=t) for t in TEXTS[:3]]
        by_ids = lw.greedy(lm, [torch.tensor(p) for p in prompts], (), 4)
        assert by_ids == lw.greedy(lm, [model.prompt_embeds(m, p) for p in prompts], (), 4)  # replay through embeddings
        for prompt, got in zip(prompts, by_ids, strict=True):
            ids = list(prompt)
            for _ in range(4):
                ids.append(int(F.softmax(lm.logits(torch.tensor([ids]))[0, -1], -1).argmax()))
            assert ids[len(prompt) :] == got
    lm = build(ModelConfig(vocab_size=257, n_layer=2, n_head=2, d_model=32, max_len=64, init_std=0.3, tie=False)).eval()
    ids, (got,) = list(b"abc"), lw.greedy(lm, [torch.tensor(list(b"abc"))], (), 6)
    for token in got:
        assert int(lm.logits(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert len(set(got)) > 3  # no model that says one word again and again
    assert lw.greedy(lm, [torch.tensor(list(b"abc"))], got[1:2], 6) == [got[:1]] and lw.greedy(lm, [torch.tensor([1])], (), 0) == [[]]
