"""The interlingua at real scale, on the meta device: the configs for 1B and 8B readers build, and a step runs forward and backward."""

import pytest
import torch

import configurator
import latent_data
import latentwire as lw
import model as models
import tokenizer
import train

LLAMA = dict(n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, vocab_size=128_256, rope_theta=5e5, tie=False)
QWEN = dict(n_layer=28, n_head=28, n_kv_head=4, d_model=3584, d_ff=18944, vocab_size=152_064, rope_theta=1e6, tie=False, qkv_bias=True)
TINYLLAMA = dict(n_layer=22, n_head=32, n_kv_head=4, d_model=2048, d_ff=5632, vocab_size=32_000, tie=False)
QWEN2 = dict(n_layer=24, n_head=14, n_kv_head=2, d_model=896, d_ff=4864, vocab_size=151_936, rope_theta=1e6, qkv_bias=True)
PARTS = {"out/llama31_8b": LLAMA, "out/qwen25_7b": QWEN, "out/tinyllama": TINYLLAMA, "out/qwen2_05b": QWEN2}


def on_meta(path):
    lm = models.build(models.ModelConfig(**PARTS[path], qk_norm=False, max_len=32768), "meta").requires_grad_(False).eval()
    lm.embed_tokens = lambda ids: torch.randn(8, lm.cfg.d_model, device="cpu")  # the only values that a build looks at
    return lm


@pytest.mark.parametrize("files, sizes, new, depth", [
    (["latent_squad"], [8_030_261_248, 7_615_616_512], 2 * 218_112_000, 10),
    (["latent_squad", "latent_tiny"], [1_100_048_384, 494_032_768], None, 12),
])  # fmt: skip
def test_real_configs_take_a_step_without_memory(monkeypatch, files, sizes, new, depth):
    cfg, _ = configurator.load(train.Config, [f"config/{name}.py" for name in files] + ["--w_kd=0", "--w_ae_qa=0"])
    tok = tokenizer.load("bytes")
    monkeypatch.setattr(lw, "frozen", on_meta)
    monkeypatch.setattr(lw, "fingerprint", lambda lm, names=None: b"known by path")
    monkeypatch.setattr(lw, "build_transformer", lambda shape: models.build(shape, "meta"))
    monkeypatch.setattr(lw, "layouts", lambda cfg: ([latent_data.Side(tok, cfg) for _ in cfg.lms], latent_data.Reader(tok, cfg)))
    with torch.device("meta"):
        net = lw.build(cfg).set_dtype(torch.bfloat16)
    for lm in net.lms:
        del lm.embed_tokens
    assert [sum(p.numel() for p in lm.parameters()) for lm in net.lms] == sizes
    blocks = [p for name, p in net.encoder.reader.named_parameters() if ".blocks." in name]
    trained = [p for p in blocks if p.requires_grad]
    assert net.encoder.reader.cfg.n_layer == depth and (trained == blocks if new is None else sum(p.numel() for p in trained) == new)
    assert all(lm.embed.weight.dtype == torch.bfloat16 for lm in net.lms) and {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in blocks if p.dim() > 1 and not p.requires_grad} <= {torch.bfloat16}  # frozen layers are never stepped

    stream = latent_data.Stream.__new__(latent_data.Stream)
    stream.cfg, stream.sides, stream.reader = cfg, net.sides, net.reader
    batch = stream.collate([("Oslo lies by the sea. " * n, [("What lies by the sea?", "Oslo")], 0.5) for n in (1, 9)])
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()} | {"bits": 0}
    sums = net(batch)
    assert {"ans/0", "ans/1", "first/0", "k/1"} <= set(sums)
    sum(sums[t] for t in sums if "right" not in t).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in [*trained, *net.adapters.parameters()])
    assert [a.net[-1].out_features for a in net.adapters] == [lm.cfg.d_model for lm in net.lms]
    z = net.packets(batch)[0]
    assert z.shape == (2 * cfg.latent_len, cfg.latent_dim) and z.dtype == torch.float32
