"""What torch.compile would meet on a GPU, without one: models on the meta device, whose attention is the varlen kernel, in one graph.

No value exists there, so a host synchronisation, a graph break or a Function that cannot be traced fails. What is not seen: kernels."""

import numpy as np
import pytest
import torch

import denoise_stream
from model import ModelConfig, build, flat

SHAPE = {"n_layer": 2, "d_model": 64, "n_head": 4, "n_kv_head": 2}
KNOBS = (
    {},
    {"ffn": "polyglu", "remat": 2},
    {"ffn": "polyglu", "gate": "lagged"},
    {"ffn": "polyglu", "gate": "sequence", "allow_noncausal": True},
    {"arch": "encdec", "ffn": "polyglu", "cross_rope": "continue"},
)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("knobs", KNOBS, ids=lambda k: "-".join(map(str, k.values())) or "swiglu")
def test_a_training_forward_is_one_graph(knobs):
    model, graphs = build(ModelConfig(**SHAPE, **knobs), "meta").set_dtype(torch.bfloat16).train(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if "arch" in knobs:
        pairs = [(np.arange(5), np.arange(3), np.arange(3), 0), (np.arange(4), np.arange(6), np.arange(6), 1)]
        batch = denoise_stream.collate(pairs)
    else:
        batch = flat([[1] * 5, [2] * 3, [3] * 8]) | {"rows": torch.arange(2), "targets": torch.zeros(16, dtype=torch.long)}
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}
    torch._dynamo.reset()
    call = torch.compile(model, dynamic=False, fullgraph=True, backend=keep)
    call(batch)
    hidden = call(batch | {"tokens": 7})  # what the model does not read compiles nothing anew
    assert len(graphs) == 1 and hidden.dtype == torch.bfloat16 and hidden.device.type == "meta"
    model(batch).float().sum().backward()  # uncompiled: forward and backward without a look at any value
    assert all(p.grad is not None for p in model.parameters())
