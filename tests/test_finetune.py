"""config/finetune_qwen3.py from a foreign folder, by every objective: it starts from those very weights and trains what it should."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import hub
import tokenizer
import train
from prepare import chat, encdec, text

transformers = pytest.importorskip("transformers", reason="pip install -e '.[export]': transformers writes the folder that is fine-tuned")
CONFIG = str(Path(__file__).parents[1] / "config" / "finetune_qwen3.py")
SHAPE = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=48, head_dim=16, d_ff=80, max_len=256)
STEP = dict(seq_len=64, tokens_per_step=256, micro_tokens=0, max_steps=3, epochs=0.0, warmup=1, log_every=1, eval_every=0, save_every=0,
            eval_tokens=256, device="cpu", dtype="float32")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random Qwen3 folder as it is downloaded, its run, its encoder-decoder, and every kind of data in its tokenizer."""
    home = tmp_path_factory.mktemp("qwen")
    letters = {c: i for i, c in enumerate(tokenizer.byte_alphabet())}
    marks = {m: 256 + i for i, m in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    torch.manual_seed(5)
    sizes = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**sizes, head_dim=16, max_position_embeddings=256, rope_theta=1e6, tie_word_embeddings=True)
    )
    model.save_pretrained(home / "hf")
    (home / "hf" / "tokenizer.json").write_bytes(tokenizer.bpe(letters, [], tokenizer.QWEN, marks, nfc=True))
    (home / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": chat.CHATML}))
    hub.main(["import", f"--from={home / 'hf'}", f"--out={home / 'run'}"])
    encdec.main([f"--from={home / 'hf'}", f"--out={home / 'encdec'}", "--num_sentinels=20"])
    lines = [f"Line {i} says that {i} and {i} make {2 * i}, which anybody can check by counting." for i in range(60)]
    write = lambda name, rows: (home / name).write_text("\n".join(map(json.dumps, rows)))  # noqa: E731
    write("text.jsonl", [{"text": line * 3} for line in lines])
    write("chat.jsonl", [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}."} for i in range(60)])
    write("pairs.jsonl", [{"query": f"twice {i}", "positive": line} for i, line in enumerate(lines)])
    write("facts.jsonl", [{"context": line, "question": "Which?", "answers": [str(i)]} for i, line in enumerate(lines)])
    for prepare, name in ((text, "text"), (chat, "chat")):
        prepare.main([f"--from={home / name}.jsonl", f"--out={home / name}", f"--tokenizer={home / 'run'}", "--val=0.1", "--workers=1"])
    return home


def tune(home, name, **keys):
    """-> (weights before, weights after) of a run of three steps."""
    keys = STEP | {"out": str(home / name), "init_from": str(home / "run"), "vocab_size": 300} | SHAPE | keys
    train.main([CONFIG, *(f"--{k}={v}" for k, v in keys.items())])
    before = {} if not keys["init_from"] else load_file(checkpoint.resolve(keys["init_from"]) / "model.safetensors")
    return before, load_file(checkpoint.resolve(home / name) / "model.safetensors")


def moved(before, after):
    """{tensor: largest change}; at 2e-5 for three steps of Adam, so anything larger did not start from there."""
    assert before.keys() == after.keys()
    change = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert max(change.values()) < 1e-4, max(change, key=change.get)
    return change


@pytest.mark.parametrize("kind", ["lm", "chat"])
def test_text_and_chats(home, kind, tmp_path, capsys):
    keys = {"packing": "documents"} if kind == "chat" else {}
    before, after = tune(home, f"out_{kind}", data=str(home / ("chat" if kind == "chat" else "text")), **keys)
    assert min(moved(before, after).values()) > 0
    rows, said = [json.loads(line) for line in (home / f"out_{kind}" / "metrics.jsonl").read_text().splitlines()], capsys.readouterr().out
    targets = [row["train/targets"] for row in rows if "train/targets" in row]
    assert len(targets) == 3 and all(0 < n < 256 if kind == "chat" else n >= 254 for n in targets)
    assert f"started from step 0 of {home / 'run'}" in said
    assert ("conversations, dropped: none; trained:" in said) == (kind == "chat")
    hub.main(["export", f"--ckpt={home / f'out_{kind}'}", "--to=transformers", f"--out={tmp_path / 'hf'}"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours, _ = checkpoint.load(home / f"out_{kind}")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert type(theirs).__name__ == "Qwen3ForCausalLM" and (theirs(ids).logits - ours.logits(ids)).abs().max() < 1e-4
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tok.chat_template == chat.CHATML and tok("a 1")["input_ids"] == tokenizer.load(home / "run").encode("a 1")


@pytest.mark.parametrize("objective", ["denoise", "contrast"])
def test_denoising_and_contrast(home, objective):
    rows = len(load_file(checkpoint.resolve(home / "encdec") / "model.safetensors")["embed.weight"])
    vocab = checkpoint.read_state(checkpoint.resolve(home / "encdec"))["config"]["vocab_size"]
    keys = {
        "arch": "encdec",
        "objective": objective,
        "init_from": str(home / "encdec"),
        "vocab_size": vocab,
        "n_sentinels": 20,
        "max_enc": 64,
    }
    keys |= {"seq_len": 256}  # what has no effect stands at its default
    if objective == "denoise":
        keys |= {"max_dec": 64, "data": str(home / "text"), "tokens_per_step": 512}
    else:
        keys |= {"data": str(home / "pairs.jsonl"), "contrast_pairs": 8, "contrast_micro": 4, "eval_tokens": 65536, "tokens_per_step": 2048}
    before, after = tune(home, f"out_{objective}", **keys)
    change = moved(before, after)
    assert rows == -(-vocab // 128) * 128
    for name, far in change.items():  # contrast trains the encoder alone
        assert (far > 0) == (objective == "denoise" or not name.startswith("decoder.")), name


def test_a_packet_for_it(home):
    keys = {"objective": "latent", "init_from": "", "lms": f"('{home / 'run'}',)", "data": str(home / "facts.jsonl"), "eval_tokens": 65536}
    keys |= {"latent_layers": 1, "latent_len": 2, "latent_dim": 8, "tokens_per_step": 512, "seq_len": 128}
    frozen = (checkpoint.resolve(home / "run") / "model.safetensors").read_bytes()
    argv = [f"--{k}={v}" for k, v in (STEP | {"out": str(home / "out_latent")} | keys).items()]
    train.main([CONFIG, *argv])
    assert checkpoint.read_state(checkpoint.resolve(home / "out_latent"))["step"] == 3
    assert (checkpoint.resolve(home / "run") / "model.safetensors").read_bytes() == frozen
