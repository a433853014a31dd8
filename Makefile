# make demo        installs, then trains, quantizes and reports a small MoE (about four minutes after the installation)
# make test        installs, then runs the tests
# make test-slow   the tests that take minutes: kill loops, whole notebooks, every kernel for every GPU
# make verify-kernels  compiles every kernel for GPUs that are not here, checks the machine code, prints a table
# make test-gpu    the hardware job, on a machine with an NVIDIA GPU: layouts, numerics, then timing
# make notebooks  runs the notebooks that are kept with outputs again
# make setup       installs into .venv only; instant when nothing changed
# make lint        ruff
#
# The tests and verify-kernels also install the compilers for GPUs that are not here (the extra aot, 1.4 GB) and the
# measurements that the planner is calibrated on (plan-data, 0.1 GB).
#
# PYTHON=... names the Python 3.12 to use; PYTEST_ARGS=... is added to pytest's command line.

PYTHON ?=
PYTEST_ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed
WITH_AOT := $(VENV)/.installed-aot
PIP_INSTALL := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
IS_312 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'

.PHONY: setup demo notebooks test test-slow test-gpu verify-kernels lint

setup: $(INSTALLED)

demo: $(INSTALLED)
	@$(VENV)/bin/moelab run --config=experiments/demo.py --workdir=runs/demo

notebooks: $(INSTALLED)
	@$(VENV)/bin/python tests/ship_notebooks.py

test: $(WITH_AOT)
	@$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(WITH_AOT)
	@$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m slow $(PYTEST_ARGS)

verify-kernels: $(WITH_AOT)
	@$(VENV)/bin/moelab kernels verify

test-gpu: $(WITH_AOT)
	@$(PIP_INSTALL) -e '.[cuda]'
	@MOELAB_TEST_PLATFORM=cuda $(VENV)/bin/python -m pytest -q -s -m gpu tests/gpu $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# The stamp is made last: an interrupted installation is taken up again. The glob finds a pyenv Python that no
# .python-version of the user's selects.
$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(VENV)/bin/python $(IS_312) 2>/dev/null; then \
	  for python in $(if $(PYTHON),'$(PYTHON)',python3.12 python3 python "$$HOME"/.pyenv/versions/3.12*/bin/python3.12 none); do \
	    if [ "$$python" != none ] && "$$python" $(IS_312) 2>/dev/null; then break; fi; \
	  done; \
	  if ! "$$python" $(IS_312) 2>/dev/null; then \
	    echo "moelab needs Python 3.12; $(if $(PYTHON),$(PYTHON) is not it,there is no python3.12 here)." >&2; \
	    echo "Install it (pyenv install 3.12, uv python install 3.12, or your distribution's package)," >&2; \
	    echo "or name it: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$python" >&2; \
	  "$$python" -m venv --clear $(VENV) || { \
	    echo "could not make $(VENV); on Debian and Ubuntu: apt install python3.12-venv" >&2; exit 2; }; \
	fi
	@echo "installing into $(VENV): a few minutes the first time" >&2
	@$(PIP_INSTALL) -e '.[data,report,dev]'
	@# Without bytecode jax takes 3 s to import instead of 0.75; a few packages ship files that do not compile.
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib moelab pallas_kernels >/dev/null 2>&1 || true
	@touch $@

$(WITH_AOT): $(INSTALLED)
	@echo "installing compilers for GPUs that are not here: a minute or two the first time" >&2
	@$(PIP_INSTALL) -e '.[data,report,dev,aot,plan-data]'
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@
