# Everything runs in .venv, which is made here from constraints.txt; only python3 and make are needed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SITE := .cache/site
STUBS := .cache/stubs
export OMP_NUM_THREADS ?= 1

.PHONY: demo gallery test test-slow test-guards test-gpu test-torch lint lint-tensorrt docs docs-formats docs-support bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/graphcomb demo

test: $(STAMP)
	$(BIN)/pytest -n 2

# The last result is in tests/slow_results.md. Properties are tried on new examples.
test-slow: $(STAMP)
	HYPOTHESIS_PROFILE=default $(BIN)/pytest -m slow -n 2 --timeout 7200 --junitxml=.cache/slow.xml; status=$$?; \
	  $(BIN)/python tests/slow_results.py .cache/slow.xml tests/slow_results.md; exit $$status

# Those of them that take minutes, not half an hour, and guard what others rest on: what CI runs besides `make test`.
test-guards: $(STAMP)
	$(BIN)/pytest -m slow -n 2 --timeout 1200 -k "not densenet121 and not regnet" tests/runtime/export tests/passes \
	  tests/graphcomb/session tests/graph/transplant

# Tests that need a GPU: models, examples and batches of a user that lie on one, and engines that run on one.
test-gpu: $(STAMP)
	GRAPHCOMB_GPU=1 $(BIN)/pytest -n 4 tests/graphcomb/test_gpu.py tests/runtime/prediction/test_latency_table.py \
	  tests/runtime/engines/test_torch_backends.py

# A short suite on another torch, which is installed beside .venv; results are in tests/torch_versions.md.
test-torch: $(STAMP)
	$(BIN)/python tests/torch_versions.py $(VERSION)

# mypy and import-linter see the packages through a wheel: an editable install hides where graphcomb.graph lies.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/bdist.* $(SITE)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target $(SITE) .
	MYPYPATH=$(SITE) $(BIN)/mypy -p graphcomb
	$(MAKE) --no-print-directory lint-tensorrt
	cd $(SITE) && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

# Calls to classic TensorRT against its official stubs, where they can be had; two slips in them are no Python. Options other
# than above want a cache of their own.
lint-tensorrt: $(STAMP)
	test -d $(STUBS) || { \
	  rm -rf $(STUBS).part && \
	  $(BIN)/pip install -q --disable-pip-version-check --no-deps --target $(STUBS).part tensorrt-stubs==10.13.0.35.1 && \
	  sed -i.orig -E 's/\bin: list\[/inputs: list[/; s/(None, channel_axis: int)\)/\1 = 0)/' \
	    $(STUBS).part/tensorrt_bindings/tensorrt.pyi && \
	  mv $(STUBS).part $(STUBS); } || echo "lint: no stubs of TensorRT to be had; its calls are not checked"
	test ! -d $(STUBS) || MYPYPATH=$(SITE):$(STUBS) $(BIN)/mypy \
	  --cache-dir .cache/mypy-stubs --follow-imports=silent \
	    -m graphcomb.runtime.engines.trt.build -m graphcomb.runtime.engines.trt.run -m graphcomb.runtime.kit.trt \
	    -m graphcomb.runtime.kit.build -m graphcomb.runtime.kit.calibrate -m graphcomb.runtime.kit.engines

# The book, in .cache/book: warnings, also of links, are errors. References come from the docstrings of a wheel, as in lint.
docs: $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	rm -rf build/lib build/bdist.* $(SITE)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target $(SITE) .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open .cache/book/index.html"

# The pages about JSON files, from the models in runtime/summary.py.
docs-formats: $(STAMP)
	$(BIN)/python docs/formats.py

# The support matrix, from benchmarks/results.
docs-support: $(STAMP)
	$(BIN)/python docs/support.py

bench: $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

# Trained networks compressed without training: docs/gallery.md, at first under three hours on two cores. ONLY=name: one card.
gallery: $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/gallery.py --only '$(or $(ONLY),*)'

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,zoo,rtx,openvino]'
	touch $@

clean:
	rm -rf out build dist .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
