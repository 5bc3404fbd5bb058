"""Half of encdec_ul2, which is itself the full run: python train.py config/encdec_ul2.py config/encdec_phase_medium.py"""

out = "out/encdec_medium"
max_steps = 50_000
