"""100 steps of encdec_ul2: does it run, does it learn at all. python train.py config/encdec_ul2.py config/encdec_phase_sanity.py"""

out = "out/encdec_sanity"
max_steps, warmup, eval_every, save_every = 100, 10, 50, 0
