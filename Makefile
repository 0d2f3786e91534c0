# Each target sets up .venv by itself. TOPD_BUILD_CPP=0 leaves the C++ extension out.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Two spinning OpenMP threads on a shared core cost a factor of ten.
RUN := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(BIN)/python
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
export TOPD_BUILD_CPP ?= 1
# Further words for pytest: TESTS=tests/test_plan.py, TESTS="-k transport".
TESTS ?=
BUILT := $(VENV)/built-$(TOPD_BUILD_CPP)

.PHONY: test lint bench demo clean

test: $(BUILT)
	$(RUN) -m pytest -n 2 --dist loadfile $(TESTS)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BUILT)
	$(RUN) -m bench.numerics
	$(RUN) -m bench.memory
	$(RUN) -m bench.speed

demo: $(BUILT)
	@$(RUN) examples/first_loss.py
	@echo "A distillation of a real model, in one command, is still to come: CHANGELOG.md says what there is."

$(VENV)/installed: requirements.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --no-deps -r requirements.txt
	touch $@

# The extension is built against the torch that runs it, hence no build isolation.
$(BUILT): $(VENV)/installed $(SOURCES)
	rm -f $(VENV)/built-* python_api/topd/_cpp_*
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build python_api/topd/_cpp_* python_api/topd.egg-info
