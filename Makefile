# Everything runs in .venv, which is made here from constraints.txt; only python3 and make are needed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SITE := .cache/site
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow lint bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/graphcomb demo

test: $(STAMP)
	$(BIN)/pytest -n 2

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# mypy and import-linter see the packages through a wheel: an editable install hides where graphcomb.graph lies.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build $(SITE)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target $(SITE) .
	MYPYPATH=$(SITE) $(BIN)/mypy -p graphcomb
	cd $(SITE) && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

bench: $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,zoo,rtx,quantize,openvino]'
	touch $@

clean:
	rm -rf out build dist .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
