"""5,000 steps of encdec_ul2. A run that is worth prolonging ends with a loss of at most 8, 0.5 below its first, after at most 5 alerts.

python train.py config/encdec_ul2.py config/encdec_phase_validation.py && python -m eval.sanity --ckpt=out/encdec_validation --learned
"""

out = "out/encdec_validation"
max_steps, save_every = 5000, 1000
