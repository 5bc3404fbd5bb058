"""The bf16 sibling of config/curriculum_nine.py: eight stages, milder multipliers, 150,000 steps, 4.90B tokens.

    python train.py config/superbpe_197m.py config/curriculum_eight.py

Untested like the nine: the published multipliers never took effect.
"""

max_steps, max_tokens = 150_000, 0
lr, warmup = 6e-4, 1500
stages = tuple(
    {"start": 1000 * _start, "seq_len": _length, "rows": _rows, "mult": _mult, "clip": _clip}
    for _start, _length, _rows, _mult, _clip in (
        (0, 128, 256, 8.0, 5.0),
        (3, 256, 128, 5.0, 2.0),
        (6, 512, 64, 3.0, 1.0),
        (10, 768, 42, 2.0, 0.5),
        (15, 1024, 32, 1.5, 0.4),
        (25, 1536, 21, 1.0, 0.3),
        (40, 2048, 16, 0.7, 0.3),
        (60, 2048, 16, 0.5, 0.3),
    )
)
