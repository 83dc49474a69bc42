# Every target sets up what it needs in .venv; a fresh Debian with Python 3.11 or newer is enough.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.edgepack-ready
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test check test-full test-npu fuzz bench golden update-toolchains format clean

help:
	@echo "make demo       build the example for three families of hardware, and benchmark it here"
	@echo "make test       the tests that need neither root nor long minutes"
	@echo "make check      ruff, mypy, import-linter"
	@echo "make test-full  the long suites: emulated devices (needs root)"
	@echo "make test-npu   blobs for Intel's NPUs, compiled in Wine (needs root, or wine64 installed)"
	@echo "make fuzz       ten thousand seeded mutations of what is read from others"
	@echo "make bench      the claims on speed, size and memory, as ratios, beside other quantisers"
	@echo "make golden     rewrite the golden plans"
	@echo "make update-toolchains   renew the pinned wheels"
	@echo "make clean      remove .venv and what was built"

$(READY): pyproject.toml constraints.txt toolchains/venv.sh
	@rm -f $@
	@test -x $(BIN)/pip || sh toolchains/venv.sh $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST) tests/unit -m "not full and not npu" --numprocesses 2 --dist loadfile
	$(PYTEST) tests/e2e -m "not full and not npu"

check: $(READY)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports

test-full: $(READY)
	$(PYTEST) -m full

test-npu: $(READY)
	@test -x /usr/lib/wine/wine64 || command -v wine64 >/dev/null || { \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends wine64 >/dev/null; }
	$(PYTEST) -m npu

fuzz: $(READY)
	EDGEPACK_MUTATIONS=10000 $(PYTEST) tests/fuzz

bench: $(READY)
	$(BIN)/python -m benchmarks.agreement --output docs/benchmarks/agreement.md
	$(BIN)/python -m benchmarks.compression --output docs/benchmarks/compression.md
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.coding
	$(BIN)/python -m benchmarks.regression_gate
	$(BIN)/python -m benchmarks.disturbances --output docs/benchmarks/disturbances.md
	$(BIN)/python -m benchmarks.fleet --output docs/benchmarks/fleet.md

golden: $(READY)
	$(PYTEST) tests/unit/test_golden_plans.py --rewrite-golden

update-toolchains: $(READY)
	$(BIN)/python toolchains/update.py

format: $(READY)
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet

clean:
	rm -rf $(VENV) build dist examples/*/dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
