# Two commands: `make demo` cuts the subjects out of real photos, `make test` runs the tests. Each sets up what it needs
# in .venv; PYTHON chooses the interpreter (3.10 or newer). Tests against the live Hub fetch 9 GB and run apart:
# `.venv/bin/python -m pytest -m hub`.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test clean

demo: $(VENV)/demo.installed
	$(VENV)/bin/python -m birefnet.demo out

test: $(VENV)/test.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -m "not hub" $(PYTEST_ARGUMENTS)

$(VENV)/demo.installed $(VENV)/test.installed: $(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) out build dist *.egg-info
