# Two commands for a fresh machine with Python >= 3.11, git and make:
#
#   make demo    installs into .venv if needed, then inspects, trains and evaluates on the data inside the package
#   make test    the same set-up, then lint, types and tests

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test lint clean

demo: .venv/installed
	rm -rf $(DEMO)
	$(BIN)/sdcli inspect resnet18 --image-size 8 --num-classes 10
	$(BIN)/sdcli train resnet18 --dataset digits --recipe quick --output $(DEMO)
	$(BIN)/sdcli eval $(DEMO)

# A process for each of two cores: together they take about eleven minutes.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Made again only when the list of what to install changes.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sdcli needs Python >= 3.11; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist runs .mypy_cache .pytest_cache .ruff_cache
