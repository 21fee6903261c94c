# The whole workflow: make demo | test | check | format | bench | clean. Needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# pyright would ask the network whether a newer version exists.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test check format bench clean

demo: $(INSTALLED)
	$(RUN) -m weightdecomp demo --out demo

test: $(INSTALLED)
	$(RUN) -m pytest -n auto -m "not slow and not gpu"

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(RUN)

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(INSTALLED)
	$(RUN) -m benchmarks.speed
	$(RUN) -m benchmarks.recovery
	$(RUN) -m benchmarks.graphs
	$(RUN) -m benchmarks.bilinear
	$(RUN) -m benchmarks.traps --quick
	$(RUN) -m benchmarks.editing
	$(RUN) -m benchmarks.processes

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis benchmarks/.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: asked for by exact version, pip takes a local CPU wheel where it is told of one,
# and what follows then finds torch already there.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	"Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install torch==2.13.0 -c constraints.txt
	$(RUN) -m pip install -e '.[dev]' -c constraints.txt
	touch $@
