"""1B tokens in ten stages whose mix moves from web text to mathematics and code, constant learning-rate multiplier.

    python train.py config/superbpe_197m.py config/superbpe_270m.py config/curriculum_progressive.py
    python train.py config/superbpe_197m.py config/superbpe_270m.py --init_from=out/superbpe_294m --out=out/superbpe_294m_sft
        --packing=documents --data=data/sft --max_tokens=100000000 --lr=2e-5                       then SFT (H100: 3e-5)

Rows are those of 24 GB; `_h100 = True` takes the larger ones with lr 8e-4. Each source is a folder of shards.
"""

_h100 = False
data = {"fineweb": "data/fineweb_t80k", "math": "data/math_t80k", "code": "data/code_t80k"}
max_steps = max_tokens = 0
lr = 8e-4 if _h100 else 6e-4
warmup = 139 if _h100 else 1536  # 1 %
_table = (  # length, million tokens, rows on 24 GB, accumulation there, rows on an H100, % fineweb, math, code
    (8, 10, 512, 1, 8192, 95, 5, 0),
    (16, 20, 256, 1, 4096, 95, 5, 0),
    (32, 30, 128, 1, 2048, 90, 8, 2),
    (64, 40, 64, 1, 1024, 85, 10, 5),
    (128, 75, 32, 1, 512, 80, 12, 8),
    (256, 100, 16, 1, 256, 75, 15, 10),
    (512, 125, 8, 1, 128, 70, 18, 12),
    (768, 150, 8, 1, 96, 65, 20, 15),
    (1536, 200, 4, 2, 48, 60, 22, 18),
    (2048, 250, 4, 2, 40, 55, 25, 20),
)
stages = tuple(
    {
        "tokens": _m * 10**6,
        "seq_len": _length,
        "rows": _big if _h100 else _rows,
        "accum": 1 if _h100 else _accum,
        "clip": 1.0,
        "mix": {"fineweb": _web / 100, "math": _math / 100, "code": _code / 100},
    }
    for _length, _m, _rows, _accum, _big, _web, _math, _code in _table
)
