"""PolyGLU 600M from scratch on one H200 (141 GB): the recipe of config/polyglu_a100.py in micro-batches twice as large.

    python train.py config/polyglu_h200.py                         one GPU; torchrun --nproc_per_node=8 for more, same batches

8 accumulations of 16 windows (65,536 tokens; 61-75 GB, estimated) make the same 524,288 tokens a step.
4.38e19 FLOP: 25 hours at 50 % of 989 TFLOP/s (an estimate, not measured here).
"""

from config.polyglu_a100 import *

out = "out/polyglu_h200"
micro_tokens = 65_536
