# make demo    first result: makes .venv, installs, runs the quickstart, prints its table, writes report/index.html
# make test    everything: makes .venv, installs, runs all tests
# make check   before a commit: format, lint, import order, fast tests

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Three at a time, on two cores too: much of it waits for other processes and for SLURM (each worker starts its own).
PYTEST = $(RUN) -m pytest -n 3 --dist worksteal

.PHONY: demo test check

$(VENV)/core: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -e '.[plots]'
	touch $@

$(VENV)/everything: $(VENV)/core
	$(RUN) -m pip install --quiet -e '.[test,backbones]'
	touch $@

demo: $(VENV)/core
	$(RUN) launch.py experiment=quickstart
	$(RUN) -m analysis report runs -o report

test: $(VENV)/everything
	$(PYTEST)

check: $(VENV)/everything
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(PYTEST) -m "not slow"
