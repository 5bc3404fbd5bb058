"""What torch.compile would meet on a GPU, without one: models on the meta device, whose attention is the flash operator, block by block.

No value exists there, so a host synchronisation, a graph break or a Function that cannot be traced fails. What is not seen: kernels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import denoise_stream
from model import ModelConfig, build, compile_blocks, flat

SHAPE = {"n_layer": 4, "d_model": 64, "n_head": 4, "n_kv_head": 2}
KNOBS = (
    {},
    {"ffn": "polyglu", "remat": 2},
    {"ffn": "polyglu", "gate": "lagged"},
    {"ffn": "polyglu", "gate": "sequence", "allow_noncausal": True},
    {"arch": "encdec", "ffn": "polyglu", "cross_rope": "continue"},
)


def two_sided(sizes):
    return denoise_stream.collate([(np.arange(n), np.arange(m), np.arange(m), i) for i, (n, m) in enumerate(sizes)])


def one_sided(lengths):
    """16 tokens; `cu` has one length however many documents there are, as data.py lays it out for compiled runs."""
    batch = flat([[1] * n for n in lengths]) | {"rows": torch.arange(2), "docs": len(lengths)}
    return batch | {"cu": F.pad(batch["cu"], (0, 17 - len(batch["cu"])), value=16)}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("knobs", KNOBS, ids=lambda k: "-".join(map(str, k.values())) or "swiglu")
def test_one_graph_serves_all_layers_and_batches(knobs, monkeypatch):
    model, graphs, real = build(ModelConfig(**SHAPE, **knobs), "meta").set_dtype(torch.bfloat16).train(), [], torch.compile
    keep = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda call, **keys: real(call, backend=keep, fullgraph=True, **keys))
    torch._dynamo.reset()
    compile_blocks(model)
    two = "arch" in knobs  # encoder blocks and decoder blocks: two graphs
    batches = map(two_sided, ([(5, 3), (4, 6)], [(4, 5), (5, 4)])) if two else map(one_sided, ([5, 3, 8], [2, 14], [1] * 16))
    for i, batch in enumerate(batches):
        batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}
        model.tau.fill_(1 / (i + 1))
        hidden = model(batch | {"tokens": 7})
        hidden.float().sum().backward()
        assert hidden.dtype == torch.bfloat16 and hidden.device.type == "meta"
    assert len(graphs) == 1 + two and all(p.grad is not None for p in model.parameters())
