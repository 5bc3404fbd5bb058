# One GPU: TinyLlama-1.1B and Qwen2-0.5B, or any two folders that hub can import.
#
#     python -m hub import --from=TinyLlama-1.1B-Chat --out=out/tinyllama --dtype=bfloat16
#     python -m hub import --from=Qwen2-0.5B-Instruct --out=out/qwen2_05b --dtype=bfloat16
#     python -m prepare.squad --source=train-v1.1.json --out=data/squad
#     python train.py config/latent_squad.py config/latent_tiny.py
#
# The reader, Qwen2's first twelve layers, is trained whole (0.32B parameters with the embedding, 5 GB with its optimizer states). A step
# is 64 passages with up to three questions each, in four micro-batches. Untested at this scale.
lms = ("out/tinyllama", "out/qwen2_05b")
latent_reader = "out/qwen2_05b"
out = "out/latent_tiny"
latent_layers = 12
latent_frozen = False
latent_blocks = 0
sequential = False
