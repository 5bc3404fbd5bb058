"""The control that PolyGLU has to beat: the same shape, data, order and schedule with a plain SwiGLU feed-forward.

    python train.py config/swiglu_baseline.py                    595,772,928 parameters
    python train.py config/swiglu_baseline.py --d_ff=4112 --parameters=597149184       nearly as many as PolyGLU's 597,153,888
    python train.py config/swiglu_baseline.py --act=silu,silu,silu,gelu,..     a fixed activation per layer

Same seed, so the same rows in the same order as config/polyglu_h200.py; only the feed-forward differs. A claim needs three initialisations
of each (--seed), a paired difference with its interval, and the wall-clock. `python -m eval.controls` does that at small scale.
A step: 8 accumulations of 16 windows of 4,096 = 524,288 tokens (80 GB: --micro_tokens=32768); 19,531 steps = 10,239,868,928 tokens.
"""

from config.polyglu_h200 import *

out = "out/swiglu_baseline"
ffn, act, parameters = "swiglu", "silu", 595_772_928
