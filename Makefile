# `make run` and `make test` set themselves up: a Python of 3.11 or newer is all they need (make run PYTHON=python3.12).
# The second time they find .venv as it should be, and begin at once.

PYTHON ?= python3
BIN := .venv/bin
CONTRACTS := $(wildcard ../shared/contracts)

.PHONY: run test test-long lint clean

# From raw text to an aligned model on this machine; the same command again resumes, or finds everything done.
run: .venv/installed
	$(BIN)/tritium run --recipe=ladder --out=runs/ladder

# Everything that must always hold: lint, kernels under Triton's interpreter, the contracts beside the checkout, the tests.
test: lint
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/test_rms_norm.py
ifneq ($(CONTRACTS),)
	TRITIUM_BACKEND=torch $(BIN)/pytest -q -p no:cacheprovider $(CONTRACTS)
	TRITON_INTERPRET=1 TRITIUM_BACKEND=triton $(BIN)/pytest -q -p no:cacheprovider $(CONTRACTS)/test_kernels.py
endif
	$(BIN)/pytest -m "not gpu and not long"

# What `test` runs, then the long tests (pytest's 5: there are none), and every kernel compiled for every target.
test-long: test
	$(BIN)/pytest -m "long and not gpu" || [ $$? -eq 5 ]
	$(BIN)/tritium doctor

# ruff: its rules, and its format.
lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Remove what was installed, built and cached; runs/ stays.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -exec rm -rf {} +

# Tests start several processes on the same cores, and by default a thread of torch spins while it waits for work:
# it would take its core from the others, and everything would be several times slower.
test test-long: export OMP_WAIT_POLICY := PASSIVE
test test-long: export OMP_NUM_THREADS := 2

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is older than 3.11: make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --constraint constraints.txt --editable .[test]
	touch $@
