# make demo    first result: makes .venv, installs, runs the quickstart, prints its table, writes report/index.html
# make test    everything: makes .venv, installs, runs all tests
# make check   before a commit: format, lint, types, import order, fast tests
# make docs    the docs site: site/index.html
# make lowest  the fast tests with the lowest versions that setup.cfg admits, in an environment of its own

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
RUN = $(VENV)/bin/python
# Four at a time, on two cores too: much of it waits for other processes and for SLURM (each worker starts its own).
PYTEST = $(RUN) -m pytest -n 4 --dist worksteal

.PHONY: demo test check docs lowest lowest-versions

$(VENV)/core: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -e '.[plots]'
	touch $@

$(VENV)/everything: $(VENV)/core
	$(RUN) -m pip install --quiet -e '.[test,backbones]'
	touch $@

$(VENV)/docs: $(VENV)/core
	$(RUN) -m pip install --quiet -e '.[docs]'
	touch $@

$(LOWEST)/constraints.txt: setup.cfg pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $@.new
	$(LOWEST)/bin/python -m pip install --quiet -e '.[test]' -c $@.new
	mv $@.new $@

demo: $(VENV)/core
	$(RUN) launch.py experiment=quickstart
	$(RUN) -m analysis report runs -o report

test: $(VENV)/everything
	$(PYTEST)

check: $(VENV)/everything
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m ty check gsdg examples --exclude "**/*.ipynb"
	$(PYTEST) -m "not slow"

docs: $(VENV)/docs
	$(RUN) -m mkdocs build --strict

lowest-versions: $(LOWEST)/constraints.txt

lowest: VENV = $(LOWEST)
lowest: lowest-versions
	$(PYTEST) -m "not slow"
