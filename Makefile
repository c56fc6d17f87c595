# `make demo` and `make test` need Python ≥ 3.11, pip and a C++ compiler; everything else they install.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/* kernels/csrc/*/*)

.PHONY: demo test compat proof bench report docs gpu gpu-wheels lint sanitize clean

demo: $(VENV)/.demo
	$(BIN)/python -m dfad.train --fused

test: $(VENV)/.dev lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not alone" --durations=15
	$(BIN)/pytest -m alone

# Real architectures as well, as far as they are installed: pip install -e '.[compat]' installs them.
compat: $(VENV)/.dev
	$(BIN)/pytest tests/compat -rs

# Those architectures from inspection to a delivered student, in half an hour; writes docs/architectures.md.
proof: $(VENV)/.dev
	$(BIN)/python -m tests.compat.proof docs/architectures.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/pytest bench --full --record

report: $(VENV)/.dev
	$(BIN)/python -m bench.report

# A site in build/site. The variable turns off the theme's notice of its successor.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Where there is no GPU, a rehearsal in an environment of its own; where there is one, what the machine has.
REHEARSE ?= $(if $(shell nvidia-smi -L 2>/dev/null),,1)
gpu: $(if $(REHEARSE),$(VENV)/.dev)
	REHEARSE=$(REHEARSE) PYTHON=$(if $(REHEARSE),$(BIN)/python,$(PYTHON)) tools/gpu/gpu.sh

# For a GPU machine without a network; WITH="PACKAGE …" adds what else it lacks.
gpu-wheels: $(VENV)/.dev
	$(BIN)/python -m tools.gpu.provision pack build/gpu/wheels $(if $(WITH),--with $(WITH))
	$(BIN)/python -m dfad.experiments.provenance

# The base interpreter does not run the editable install's import hook, which would hide the sanitized extension.
sanitize: $(VENV)/.dev
	$(BIN)/pip install -c constraints.txt --no-deps --upgrade --target build/sanitized \
	  --config-settings=cmake.define.DFAD_SANITIZE=ON --config-settings=build-dir=build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH="build/sanitized:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $$($(BIN)/python -c 'import sys; print(sys._base_executable)') -m pytest tests/kernels -k "not triton and not offline"

# The source distribution and, built from it in isolation, the wheel.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) build
