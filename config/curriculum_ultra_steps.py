"""The ten stages as published: 200,000 steps of 4,096 to 16,384 tokens, 2.048B in all.

    python train.py config/superbpe_197m.py config/curriculum_ultra_steps.py

The published table also lists accumulation, which its code never applied; `_accumulate = True` does: 8.593B tokens.
Small micro-batches leave a large GPU idle; config/curriculum_ultra.py spends the same tokens in 20,834 steps.
"""

_accumulate = False
max_steps, max_tokens = 200_000, 0
warmup = 2000  # 1 %
stages = tuple(
    {"start": _start, "seq_len": _length, "rows": _rows, "accum": _accum if _accumulate else 1, "mult": _mult, "clip": _clip}
    for _start, _length, _rows, _accum, _mult, _clip in (
        (0, 8, 512, 8, 0.30, 0.5),
        (2_000, 16, 256, 4, 0.40, 0.5),
        (5_000, 32, 128, 4, 0.50, 0.7),
        (10_000, 64, 64, 4, 0.60, 0.8),
        (20_000, 128, 32, 4, 0.75, 0.9),
        (35_000, 256, 16, 4, 0.85, 1.0),
        (55_000, 512, 8, 4, 0.95, 1.0),
        (80_000, 768, 16, 3, 1.0, 1.0),
        (110_000, 1536, 8, 6, 1.0, 1.0),
        (140_000, 2048, 8, 4, 1.0, 1.0),
    )
)
