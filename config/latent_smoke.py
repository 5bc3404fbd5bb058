# Real parts on a CPU: SmolLM2-135M-Instruct reads packets of real SQuAD passages. A proof that the parts fit, not a result.
#
#     python -m hub import --from=SmolLM2-135M-Instruct.Q4_1.gguf --out=out/smollm2
#     python -m prepare.squad --source=requests.jsonl.gz --out=data/squad --limit=800    # and the rest as --split=test
#     python train.py config/latent_squad.py config/latent_smoke.py                      # about 10 s a step on two cores
lms = ("out/smollm2",)
out = "out/latent_smoke"
seq_len = 320
tokens_per_step = 4 * seq_len
micro_tokens = 4 * seq_len
max_steps = 60
latent_layers = 4
latent_frozen = False
latent_blocks = 0
latent_dim = 64
latent_questions = 1
w_kd = 0.0
w_ae_qa = 0.0
sequential = False
lr = 5e-4
warmup = 10
save_every = 20
log_every = 5
