# Real parts on a CPU: SmolLM2-135M-Instruct and a reader of `make latent` read packets of real SQuAD passages. A proof that the parts
# fit (49,152 and 2,048 ids, width 576 and 128, a chat template and none), not a result: 778 questions to train on, and the small reader
# knows facts about made-up people only.
#
#     python -m prepare.parts smollm2 tasks
#     python -m hub import --from=.parts/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=out/smollm2
#     python -m prepare.squad --source=.parts/tasks/squad/bpb_5shot/requests.jsonl.gz --out=data/squad --passages=600
#     python -m prepare.squad --source=.parts/tasks/squad/bpb_5shot/requests.jsonl.gz --out=data/squad --split=test --skip_passages=600
#     python train.py config/latent_squad.py config/latent_smoke.py
lms = ("out/smollm2", "out/latent_lm_b")
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
