# Each target sets up .venv by itself. The C++ extension must build; TOPD_BUILD_CPP=0 leaves it out.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Two spinning OpenMP threads on a shared core cost a factor of ten.
RUN := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(BIN)/python
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
export TOPD_BUILD_CPP ?= 1
# Further words for pytest: TESTS=tests/ops/test_plan.py, TESTS="-k transport".
TESTS ?=
DEMO ?=
BUILT := $(VENV)/built-$(TOPD_BUILD_CPP)

# Two workers with a thread each; the tests of threads set their own number.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p no:benchmark

.PHONY: test test-all lint bench bench-smoke quality demo install-check clean

test: $(BUILT)
	$(PYTEST) -m "not slow" $(TESTS)

# The tests marked slow too: what takes long and says little more than a test beside it.
test-all: $(BUILT)
	$(PYTEST) $(TESTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

# The tables and pictures of the documentation, into build/bench (hours): CASES="numerics transport".
BENCH := $(RUN) -m topd.cli.main bench
CASES ?= divergence logprobs memory numerics guidance transport windows step pairs profile
bench: $(BUILT)
	mkdir -p build/bench
	for case in $(CASES); do $(BENCH) --case $$case --json build/bench/$$case.json || exit 1; done
	for case in divergence memory; do for sweep in tokens vocab; do \
	  $(BENCH) --case $$case --sweep $$sweep --json build/bench/$$case-$$sweep.json --plot build/bench/$$case-$$sweep.png \
	    || exit 1; done; done

# A few ratios of topd bench below twice their bounds (90 s).
bench-smoke: $(BUILT)
	$(RUN) -m tools.bench_smoke

# Does it teach: every method on every task, eight paired seeds (an hour). QUALITY="--tasks sorting --rows opd topd --seeds 2".
QUALITY ?=
quality: $(BUILT)
	OMP_NUM_THREADS=1 $(RUN) -m quality.experiment $(QUALITY)

# The tests that meet transformers and TRL, under other versions of them (an hour): VERSIONS="trl==1.12.0 transformers==5.0.0".
VERSIONS ?=
.PHONY: versions
versions: $(BUILT)
	$(RUN) tools/versions.py $(VERSIONS)

# The interpreter's tests and the compilation ahead of time under other versions of Triton (an hour): TRITON="3.6.0 3.7.1".
TRITON ?=
.PHONY: triton-versions
triton-versions: $(BUILT)
	$(RUN) -m tools.triton_versions $(TRITON)

# Further words for the demo: DEMO=--quick, DEMO="--seed 1 --out seed-1".
demo: $(BUILT)
	@$(RUN) -m topd.cli.main demo $(DEMO)

# docs/ as a site, build/docs/index.html; a warning is an error.
.PHONY: docs
docs: $(VENV)/installed-docs
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "the site: build/docs/index.html"

# README's install line in fresh environments, with and without a compiler (minutes).
install-check:
	$(PYTHON) tests/house/install_check.py

$(VENV)/installed: requirements.txt requirements-demo.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --no-deps -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -r requirements-demo.txt
	touch $@

$(VENV)/installed-docs: $(VENV)/installed requirements-docs.txt
	$(PIP) --no-deps -r requirements-docs.txt
	touch $@

# The extension is built against the torch that runs it, hence no build isolation. An editable installation is looked for after
# every folder of the path: where the clone is named topd, Python would take it for the package in the folder that holds it, but
# for topd-clone.pth.
$(BUILT): $(VENV)/installed $(SOURCES)
	rm -f $(VENV)/built-* python_api/topd/_cpp_*
	$(PIP) --no-build-isolation --no-deps --editable .
	$(BIN)/python -c "import pathlib, sysconfig; p = pathlib.Path(sysconfig.get_path('purelib'), 'topd-clone.pth'); \
	  p.write_text('$(CURDIR)/python_api\n')"
	touch $@

clean:
	rm -rf $(VENV) build python_api/topd/_cpp_* python_api/topd.egg-info
