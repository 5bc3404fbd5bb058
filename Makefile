# Each target does all of its own set-up in .venv and can be run again: what is done is not done twice.
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist=worksteal

.PHONY: quickstart test bench encdec latent

quickstart: .venv/.plot ## train a small model on Python's own source, measure it and let it write
	$(PY) -m prepare.text --from=stdlib --out=data/stdlib --tokenizer=bpe:4096 --val=0.02
	$(PY) train.py config/quickstart.py --resume=auto
	$(PY) -m eval.plots --run=out/quickstart
	$(PY) -m eval.perplexity --ckpt=out/quickstart --data=data/stdlib
	$(PY) -m eval.routing --ckpt=out/quickstart --windows=8 --draws=1
	$(PY) sample.py --ckpt=out/quickstart --prompt="$$(printf 'class Reader:\n    def __init__(self')" --max_new_tokens=200 --temperature=0.6 --seed=6

test: .venv/.test ## every test; then a GPU's kernels in the interpreter of Triton, which torch for a CPU shall not see, hence a place of its own
	$(PYTEST)
	test -d .venv/triton || $(PY) -m pip install -q --no-deps --target .venv/triton "triton==3.9.0; sys_platform == 'linux'"
	test ! -d .venv/triton || TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/.venv/triton $(PYTEST) tests/test_*triton.py tests/test_head.py tests/test_kernels.py

bench: .venv/.test ## speed against named peers, as ratios
	$(PY) bench.py --suite=cpu

encdec: $(patsubst %_full,%_ul2,$(addprefix encdec_,$(or $(PHASES),sanity validation medium full))) ## UL2 of out/encdec_init, phase by phase; the first that fails ends it
encdec_%: .venv/.plot
	$(PY) train.py config/encdec_ul2.py $(wildcard config/encdec_phase_$*.py) --init_from=out/encdec_init --resume=auto $(ARGS)
	$(PY) -m eval.sanity --ckpt=out/encdec_$* $(if $(filter validation,$*),--learned)

latent: .venv/.plot ## two small readers, one packet between them, and everything that could refute it
	$(PY) -m prepare.factqa --out=data/factqa --bpe=1152 --shards=data/facts_a
	$(PY) -m prepare.factqa --out=data/factqa --bpe=2048 --shards=data/facts_b
	OMP_NUM_THREADS=1 $(PY) train.py config/latent_lm_a.py --resume=auto & \
	OMP_NUM_THREADS=1 $(PY) train.py config/latent_lm_a.py config/latent_lm_b.py --resume=auto && wait $$!
	$(PY) -m eval.latent --lms="('out/latent_lm_a', 'out/latent_lm_b')" --data=data/factqa/dev.jsonl --require=0.95
	$(PY) train.py config/latent_toy.py --resume=auto
	$(PY) -m eval.latent --ckpt=out/latent_toy --data=data/factqa/test.jsonl --samples=1024 --bytes="(40, 55)"

.venv/.%: pyproject.toml # torch by the exact name of its small build, whatever the packages behind it ask for
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q torch==2.13.0 -e .[$*]
	touch $@
