"""PolyGLU 600M from scratch on one H200 (141 GB): the recipe of config/polyglu_a100.py in micro-batches twice as large.

    python train.py config/polyglu_h200.py                         one GPU; torchrun --nproc_per_node=8 for more, same batches

8 accumulations of 16 windows (65,536 tokens; 85 GiB at the peak) make the same 524,288 tokens a step.
103,400 tokens/s of whole windows, 44.7 % MFU, were measured on an H200 (LOG.md): 27.5 hours for 10.24B tokens.
"""

from config.polyglu_a100 import *

out = "out/polyglu_h200"
micro_tokens = 65_536
