"""The larger sibling, 293,684,736 parameters: the published "270M" counts its blocks alone, 267,968,512.

    python train.py config/superbpe_197m.py config/superbpe_270m.py config/curriculum_progressive.py

Published under the same name: --d_ff=2400 (290,932,224) and --d_model=640 --n_layer=28 --n_head=10 --d_ff=1712 (145,281,280); the
shape is asserted, so --parameters=290932224 goes with it.
The untied heads: 472,889,216, 470,136,704 and 273,284,480. Read after config/superbpe_197m.py, which holds the rest.
"""

out = "out/superbpe_294m"
n_layer, n_head, d_model, d_ff = 32, 14, 896, 2432
parameters = 293_684_736
