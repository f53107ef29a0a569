# Each target installs what it needs into .venv. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

OLDEST_PYTHON ?= python3.10
OLDEST_VENV := .venv-oldest
# These extras need newer versions than the package itself.
OLDEST_LEFT_OUT := batch export serve video

.PHONY: help demo test test-oldest clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24
	@echo '  PYTHON=python3.12 make …       use another interpreter'
	@echo '  PYTEST_ARGUMENTS=… make test   pass arguments to pytest, such as tests/test_modeling.py'
	@echo '  $(VENV)/bin/python -m pytest -m hub   tests against the live Hugging Face Hub (downloads 9 GB)'

demo: $(VENV)/demo.installed  ## cut the subjects out of three photos into out/
	$(VENV)/bin/python -m birefnet.demo out

test: $(VENV)/test.installed  ## check the style and run the tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not hub" -n 2 --dist loadfile $(PYTEST_ARGUMENTS)

test-oldest: $(OLDEST_VENV)/test.installed  ## run the tests with Python 3.10 and the oldest dependencies
	$(OLDEST_VENV)/bin/python -m pytest -m "not hub" $(OLDEST_LEFT_OUT:%=--ignore tests/%) $(PYTEST_ARGUMENTS)

$(OLDEST_VENV)/test.installed: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[demo,train,evaluate,heif]' pytest 'setuptools>=77' wheel
	touch $@

$(VENV)/demo.installed $(VENV)/test.installed: $(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:  ## remove .venv, out/ and build results
	rm -rf $(VENV) $(OLDEST_VENV) out build dist *.egg-info
