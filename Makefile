# Each target does all of its own set-up in .venv and can be run again: what is done is not done twice.
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test lint bench encdec latent faults

quickstart: .venv/.train ## train a small model on Python's own source, measure it and let it write
	$(PY) -m prepare.text --from=stdlib --out=data/stdlib --tokenizer=bpe:4096 --val=0.02
	$(PY) train.py config/quickstart.py --resume=auto
	$(PY) -m eval.plots --run=out/quickstart
	$(PY) -m eval.perplexity --ckpt=out/quickstart --data=data/stdlib
	$(PY) -m eval.routing --ckpt=out/quickstart --windows=8 --draws=1
	$(PY) sample.py --ckpt=out/quickstart --prompt="$$(printf 'class Reader:\n    def __init__(self')" --max_new_tokens=200 --temperature=0.6 --seed=6

test: .venv/.test .venv/.triton ## every test; two at a time, one thread each; then a GPU's kernels in Triton's interpreter
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist=worksteal
	test ! -d .venv/triton || TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/.venv/triton OMP_NUM_THREADS=1 \
	    $(PY) -m pytest -n 2 --dist=worksteal tests/test_decode_triton.py tests/test_fp8_triton.py tests/test_head.py tests/test_kernels.py

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/.test ## speed against named peers, as ratios
	$(PY) bench.py --suite=cpu

PHASES ?= sanity validation medium full
INIT ?= out/encdec_init
encdec: .venv/.train ## UL2 of config/encdec_ul2.py from INIT by PHASES, with ARGS for train.py; the first phase that fails ends it
	set -e; for phase in $(PHASES); do \
	    run=$$phase; more=config/encdec_phase_$$phase.py; learned=; \
	    if test $$phase = full; then run=ul2; more=; fi; \
	    if test $$phase = validation; then learned=--learned; fi; \
	    $(PY) train.py config/encdec_ul2.py $$more --init_from=$(INIT) --resume=auto $(ARGS); \
	    $(PY) -m eval.sanity --ckpt=out/encdec_$$run $$learned; \
	done

latent: .venv/.train ## two small readers, one packet between them, and everything that could refute it
	$(PY) -m prepare.factqa --out=data/factqa --bpe=1152 --shards=data/facts_a
	$(PY) -m prepare.factqa --out=data/factqa --bpe=2048 --shards=data/facts_b
	OMP_NUM_THREADS=1 $(PY) train.py config/latent_lm_a.py --resume=auto & \
	OMP_NUM_THREADS=1 $(PY) train.py config/latent_lm_a.py config/latent_lm_b.py --resume=auto && wait $$!
	$(PY) -m eval.latent --lms="('out/latent_lm_a', 'out/latent_lm_b')" --data=data/factqa/dev.jsonl --require=0.95
	$(PY) train.py config/latent_toy.py --resume=auto
	$(PY) -m eval.latent --ckpt=out/latent_toy --data=data/factqa/test.jsonl --samples=1024 --bytes="(40, 55)"

faults: .venv/.test ## every promise of README's table, the long way (ten minutes), and its figures
	KILLS=100 FUZZ=20 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist=worksteal tests/test_faults.py tests/test_scale.py tests/test_fuzz.py

.venv/.train: pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q torch==2.13.0 -e .[plot]
	touch $@

.venv/.test: .venv/.train
	$(PY) -m pip install -q torch==2.13.0 -e .[test]
	touch $@

.venv/.triton: .venv/.test # beside the other packages: torch for a CPU shall not see it; there is none but for Linux
	test "$$(uname -s)" != Linux || $(PY) -m pip install -q --no-deps --upgrade --target .venv/triton triton==3.9.0
	touch $@
