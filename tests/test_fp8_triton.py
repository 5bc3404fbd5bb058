"""fp8_triton.py against the plain cast, bit by bit: the kernel on a GPU or in Triton's interpreter, the operator anywhere."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import library

import fp8_triton
from fp8_triton import E4M3, E5M2
from glu_triton import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bits(x):
    """As integers, every NaN the same one: its sign is nobody's business."""
    return torch.where(x.isnan(), -1, x.view(torch.uint8 if x.element_size() == 1 else torch.int32).int())


@pytest.mark.skipif(not HAS_TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m, k", [(16, 16), (144, 272), (400, 128)])
@pytest.mark.parametrize("tile", [{}, {"BM": 64, "BK": 64, "num_warps": 4}, {"BM": 256}], ids=str)
def test_both_layouts_are_the_plain_cast_to_the_bit(kind, dtype, m, k, tile, monkeypatch):
    """The interpreter truncates where a GPU rounds to FP8: it is given fp32 to write instead."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).mul_(100).to(dtype)
    x[:3, 5], x[m - 1, k - 1], x[m // 2, k // 2] = torch.tensor([float("inf"), float("-inf"), 1e30]), float("nan"), -0.0
    x[5] *= 2.0**-18  # subnormal in either kind
    x, scale = x.to(DEVICE), torch.tensor(2.3, device=DEVICE)
    top, form = fp8_triton.MAX[kind], kind if DEVICE == "cuda" else torch.float32
    monkeypatch.setitem(fp8_triton.MAX, form, top)
    want = fp8_triton.cast(x, scale, form)
    row, col = x.new_empty(m, k, dtype=form), x.new_empty(k, m, dtype=form)
    fp8_triton.launch(x, scale, row, col, **fp8_triton.TILE | tile)
    values = want.float().nan_to_num()
    assert values.max() == top == -values.min()
    assert torch.equal(bits(row), bits(want)) and torch.equal(bits(col), bits(want).t())


def test_a_fouled_transpose_stops_the_run(monkeypatch, dies):
    fp8_triton.expect_sound_casts([(torch.float32, E4M3), (torch.bfloat16, E5M2)], "cpu")
    right = fp8_triton.cast_both
    for border in (True, False):  # Triton makes a program of its own for a scale that lies on a border of 16 bytes

        def fouled(x, scale, kind, border=border):
            row, col = right(x, scale, kind)
            return row, col.flip(0) if (scale.data_ptr() % 16 == 0) == border else col

        monkeypatch.setattr(fp8_triton, "cast_both", fouled)
        dies(lambda: fp8_triton.expect_sound_casts([(torch.float32, E4M3)], "cpu"), "set TRITON_PTXAS_PATH to a ptxas of CUDA 13.3")


@pytest.mark.gpu
def test_casts_are_sound_with_the_assembler_that_a_user_has():
    """In a process of its own: inductor points Triton to another ptxas in those where it has compiled."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_PTXAS_PATH"}
    kinds = "[(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in (fp8_triton.E4M3, fp8_triton.E5M2)]"
    code = f"import torch, fp8_triton; fp8_triton.expect_sound_casts({kinds}, 'cuda')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_operator_is_what_torch_takes_it_for():
    for kind in (E4M3, E5M2):
        x = torch.randn(32, 48)
        library.opcheck(torch.ops.prism.cast_both, (x, torch.tensor(2.0), kind == E5M2))
        for a, b in zip(
            torch.ops.prism.cast_both(x, torch.tensor(2.0), kind == E5M2), fp8_triton.cast_both(x, torch.tensor(2.0), kind), strict=True
        ):
            assert a.dtype == kind and a.is_contiguous() and torch.equal(a.float(), b.float())


@pytest.mark.gpu
@pytest.mark.parametrize("m, k", [(98304, 1536), (2064, 5376), (16384 + 16, 272)])
def test_the_operator_on_a_gpu_compiled_or_not(m, k):
    import fp8  # needs more than the interpreter does

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(1))
    for kind in (E4M3, E5M2):
        state = SimpleNamespace(margin=0, delayed=False)
        call = lambda x, kind=kind, state=state: fp8.operand(x * 2, kind, state)  # noqa: E731
        scale = fp8.scale_of((x * 2).abs().amax().float(), kind)
        want = fp8.cast(x * 2, scale, kind)
        for run in (call, torch.compile(call, dynamic=False)):
            row, col, inverse = run(x)
            assert torch.equal(row.view(torch.uint8), want.view(torch.uint8)) and torch.allclose(inverse, scale.reciprocal(), rtol=1e-6)
            assert torch.equal(col.view(torch.uint8), want.view(torch.uint8).t())
