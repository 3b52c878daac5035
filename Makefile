# make demo   install, then: recommend for a well-known model, and plan → apply → verify on the small model in data/demo
# make test   install, then the whole test suite (slow tests too; not those that need a GPU)
# make check  formatting, lint, types, import layers
# make fast   the fast tests only

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-output

.PHONY: demo test fast check format bench clean

demo: $(VENV)/.demo
	@echo "== this machine"
	$(BIN)/qplan probe
	@echo "== how would Llama 2 13B run best here?"
	$(BIN)/qplan recommend llama-2-13b
	@echo "== the small model that comes with qplan: plan, apply, verify"
	@mkdir -p $(OUT)
	QPLAN_HOME=$(OUT)/home $(BIN)/qplan plan demo --types Q4_K_M -o $(OUT)/plan.json
	QPLAN_HOME=$(OUT)/home $(BIN)/qplan apply $(OUT)/plan.json --output $(OUT) || \
		{ [ $$? -eq 5 ] && echo "== outside the range: this machine is busy, or qplan has to learn of it; it now has"; }
	@echo "== the measurements are kept; the next estimate for this model here names them"
	QPLAN_HOME=$(OUT)/home $(BIN)/qplan measurements

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not gpu"

fast: $(VENV)/.test
	$(BIN)/python -m pytest -m "not gpu and not slow"

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OUT) dist build

$(VENV)/bin/python:
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "qplan needs Python 3.11 or later"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "== installing qplan with llama.cpp; compiling it takes 7 to 15 minutes the first time"
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	@touch $@

$(VENV)/.test: pyproject.toml tests/install_torch.py $(VENV)/.demo
	@echo "== installing what the tests need, with a CPU build of torch where there is no NVIDIA GPU"
	$(BIN)/python tests/install_torch.py
	$(BIN)/python -m pip install --quiet --editable '.[gguf,hub,serve,tui,analysis,dev]'
	@touch $@
