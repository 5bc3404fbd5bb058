"""PolyGLU 600M from scratch on one H100 80 GB: the recipe of config/polyglu_a100.py, which fits the same memory.

    python train.py config/polyglu_h100.py                         one GPU; torchrun --nproc_per_node=8 for more, same batches

4.38e19 FLOP: 25 hours at 50 % of 989 TFLOP/s (an estimate, not measured here).
"""

from config.polyglu_a100 import *

out = "out/polyglu_h100"
