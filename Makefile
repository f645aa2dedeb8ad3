# `make demo` and `make test` do everything on a fresh machine; `make` says what else there is.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## a teacher is trained, a student distilled from it and measured (minutes)
	$(BIN)/sadkern demo

test: $(INSTALLED)  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadscope

slow: $(INSTALLED)  ## the slow tests: a real 135M model, the demonstration at full length
	$(BIN)/python -m pytest -m slow -s

docs: $(INSTALLED)  ## the documentation, in build/site, its links and figures checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m bench.figures
	@echo "build/site/index.html"

bench: $(INSTALLED)  ## speed and memory beside PyTorch, TRL and Liger, in one run, as ratios
	$(BIN)/python -m pytest bench/bench_*.py --benchmark-enable --benchmark-columns=median,iqr,rounds -v

gpu: $(INSTALLED)  ## on a machine with an NVIDIA GPU: is all right there, how fast is it
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[triton,bench,peers]'
	$(BIN)/python -m bench.gpu

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## remove what was built and installed
	rm -rf $(VENV) build *.egg-info sadkern/_C*.so sadkern/_cuda*.so

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "sadkern needs Python 3.10 or newer with venv (Debian, Ubuntu: apt install python3-venv); got $$($(PYTHON) --version 2>&1)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,test,docs,lint]'
	touch $@

.PHONY: help demo test slow docs bench gpu lint clean
