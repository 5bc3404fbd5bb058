"""5,000 steps of encdec_ul2. A run that is worth prolonging ends with train/loss below 8, at least 0.5 below its value after warm-up.

python train.py config/encdec_ul2.py config/encdec_phase_validation.py
"""

out = "out/encdec_validation"
max_steps, save_every = 5000, 1000
