# llmkit: what a person does with this repository. `make help` lists it.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_VERSION := 26.0.1
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
CHECKERS := .venv-azure
RUN ?= runs/quickstart
ARGS ?=
JOBS ?= 2
COVERAGE ?= 90

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-notebooks test-python coverage conformance azurite declarations image-locks check format lab demo bench bench-serving bench-training bench-optimization bench-drift bench-rollout bench-monitoring soak hooks lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# The stamp is newer than what it was made from, or the environment is brought up to date.
$(INSTALLED): requirements.txt setup.py settings.ini
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "error: $(PYTHON) is not Python 3.11; call make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: $(INSTALLED) ## Create .venv and install the lock and llmkit into it

quickstart: $(INSTALLED) ## Run the whole line, ending with a report (ARGS="--resume", ARGS="--data FILE...")
	@$(BIN)/llmkit quickstart --out $(RUN) $(ARGS)

test: $(INSTALLED) ## Run all notebooks and tests, with the coverage of llmkit/ over both
	@$(BIN)/coverage erase
	@status=0; \
	$(MAKE) --no-print-directory test-notebooks || status=1; \
	$(MAKE) --no-print-directory test-python || status=1; \
	$(MAKE) --no-print-directory coverage || status=1; \
	if [ -f .pytest-summary ]; then cat .pytest-summary; rm -f .pytest-summary; fi; \
	exit $$status

test-notebooks:
	@$(BIN)/coverage run tools/nbtest.py -j $(JOBS)

test-python:
	@rm -f .pytest-summary
	@set -o pipefail; $(BIN)/coverage run -m pytest | tee .pytest-log; status=$$?; \
	tail -n 1 .pytest-log > .pytest-summary; rm -f .pytest-log; exit $$status

coverage:
	@$(BIN)/coverage combine -q && $(BIN)/coverage report --fail-under=$(COVERAGE)

$(PEERS)/.installed: tests/peers/requirements.txt | $(INSTALLED)
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check -r tests/peers/requirements.txt
	@touch $@

conformance: $(INSTALLED) $(PEERS)/.installed ## Hold the server to other people's suites: schemathesis, langchain-tests, lm-eval
	@LLMKIT_PYTHON=$(abspath $(BIN))/python $(PEERS)/bin/python -m pytest tests/peers

azurite: ## Install Azurite, for which the tests of Azure ML otherwise have a stand-in (needs npm)
	@npm install --silent --no-audit --no-fund --prefix .azurite azurite@3.35.0

# checkov brings some hundred packages that fit no other environment.
$(CHECKERS)/.installed: tests/azure_tools.txt | $(INSTALLED)
	@test -x $(CHECKERS)/bin/python || $(BIN)/python -m venv $(CHECKERS)
	@$(CHECKERS)/bin/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	@$(CHECKERS)/bin/python -m pip install -qq --disable-pip-version-check -r tests/azure_tools.txt
	@touch $@

declarations: $(INSTALLED) $(CHECKERS)/.installed ## Check azure/ and the workflows, also with checkov, hadolint, zizmor
	@$(BIN)/python -m pytest tests/test_azure_files.py

image-locks: $(INSTALLED) $(CHECKERS)/.installed ## Write the locks of the images in azure/environments
	@$(CHECKERS)/bin/python tools/image_locks.py

check: $(INSTALLED) ## Format, lint, types, and package and README in sync with the notebooks
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy llmkit
	@$(BIN)/python tools/sync.py

format: $(INSTALLED) ## Bring all of that in order
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/readme.py

lab: $(INSTALLED) ## Open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

demo: $(INSTALLED) ## Open a chat over the model of the last quickstart (RUN=FOLDER for another)
	@test -d $(RUN)/02_train_model/model || { echo "error: no model in $(RUN); run make quickstart first" >&2; exit 2; }
	@$(BIN)/llmkit demo quickstart=$(RUN)/02_train_model/model $(ARGS)

# The numbered notebooks there hold what the others are made of. ARGS="" runs the tiny presets, without peers.
bench: bench-serving bench-training bench-optimization bench-drift bench-rollout bench-monitoring ## Run the benchmarks beside their peers, each into a new folder in runs/bench/ (ARGS="-p NAME VALUE...")

bench-serving: ARGS = -p size S -p rounds 3 -p peers llama.cpp,transformers,litserve,vllm,openvino
bench-training: ARGS = -p size full -p rounds 3 -p parts sft,parity,resume,kills,misconfigured,nodes,memory
bench-optimization: ARGS = -p size S -p rounds 3
bench-drift: ARGS = -p peers evidently,nannyml,river -p rows 10000000 -p windows 20 -p trials 51 -p calibrated 1000000 -p table 10000 -p rounds 3
bench-rollout: ARGS = -p size full -p runs 10000 -p parts judge,rules,kills,experiments
bench-monitoring: ARGS = -p size full -p rounds 5
bench-serving bench-training bench-optimization bench-drift bench-rollout bench-monitoring: bench-%: $(INSTALLED)
	@$(BIN)/llmkit run nbs/benchmarks/$*.ipynb --out runs/bench/$*-$$(date +%Y%m%d-%H%M%S) $(ARGS)

soak: $(INSTALLED) ## Run the tests that take over a minute
	@$(BIN)/python -m pytest -m soak --timeout 3600

hooks: $(INSTALLED) ## Install git hooks: nbdev's for merging and cleaning notebooks, pre-commit's for the checks
	@$(BIN)/nbdev_install_hooks
	@$(BIN)/pre-commit install

lock: $(INSTALLED) ## Write requirements.txt from what is installed in .venv
	@$(BIN)/python tools/lock.py

clean: ## Remove what can be made again; .venv, .venv-peers, .venv-azure and runs/ stay
	@rm -rf build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache _docs _proc *.egg-info
	@find . \( -path ./$(VENV) -o -path ./$(PEERS) -o -path ./$(CHECKERS) \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
