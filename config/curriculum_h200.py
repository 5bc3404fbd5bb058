"""The ten stages with batches for an H200: 300,000 steps of 32,768 to 36,864 tokens, 10.24B in all, about 10 h.

    python train.py config/superbpe_197m.py config/curriculum_h200.py

Measured in bf16 with documents kept apart: 303,000 tokens/s in the short windows, 339,000 at 128, 255,000 at 2,048 (LOG.md).
"""

max_steps, max_tokens = 300_000, 0
warmup = 3000  # 1 %
stages = tuple(
    {"start": 1000 * _start, "seq_len": _length, "rows": _rows, "mult": _mult, "clip": _clip}
    for _start, _length, _rows, _mult, _clip in (
        (0, 8, 4096, 0.30, 0.5),
        (3, 16, 2048, 0.40, 0.5),
        (8, 32, 1024, 0.50, 0.7),
        (15, 64, 512, 0.60, 0.8),
        (30, 128, 256, 0.75, 0.9),
        (50, 256, 128, 0.85, 1.0),
        (80, 512, 64, 0.95, 1.0),
        (120, 768, 48, 1.0, 1.0),
        (170, 1536, 24, 1.0, 1.0),
        (220, 2048, 16, 1.0, 1.0),
    )
)
