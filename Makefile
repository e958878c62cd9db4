# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow test-browser conformance golden bench-dry lint types lock clean

demo: $(VENV)/.installed
	$(BIN)/python -m train.demo --out_dir $(OUT)

# Test files are shared out among processes: most of their time is compiling, which uses one core.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not browser and not conformance" $(PARALLEL)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(PARALLEL)

# The chat page in a headless Chromium, which the machine must have: `apt-get install chromium` on Debian.
test-browser: $(VENV)/.installed
	MINILLM_TEST_BROWSER=required $(BIN)/python -m pytest -m browser $(PARALLEL)

# Held against torch and transformers, live; and the stored numbers of tests/golden made anew.
conformance: $(VENV)/.conformance
	$(BIN)/python -m pytest -m conformance tests/conformance

golden: $(VENV)/.conformance
	for script in tests/golden/make_golden*.py; do $(BIN)/python $$script || exit 1; done

# All that a GPU is to show, on a CPU with tiny shapes; `bash benchmarks/gpu.sh` is the real thing.
bench-dry: $(VENV)/.installed
	PYTHON=$(BIN)/python JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax bash benchmarks/gpu.sh --dry --out out/gpu-dry

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# The environment: exactly the locked versions, checked by hash, and the project itself.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $@

# PyTorch comes by pip, which also finds wheels that lie on the machine; everything else keeps to the locked versions.
$(VENV)/.conformance: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --constraint requirements.lock --editable '.[conformance]'
	touch $@

# Renew the locked versions; no index address is written.
lock:
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --no-header --extra dev -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
