# What to do here, in one word each. The work is in .ci/ and in manage.py.

PYTHON = .venv/bin/python

.PHONY: help demo demo-once test lint format docs benchmark clean

help:  ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 - /p' $(MAKEFILE_LIST)

demo:  ## Migrate, seed, start the site and runjobs, emit real events; stop with Ctrl-C
	@.ci/venv
	@$(PYTHON) manage.py demo

demo-once:  ## The same, ends when nothing is due and prints the runs
	@.ci/venv
	@$(PYTHON) manage.py demo --once

test:  ## The whole suite on SQLite, and on PostgreSQL and MariaDB where they answer (ARGS="..." for pytest)
	@.ci/test $(ARGS)

lint:  ## ruff and mypy
	@.ci/lint

format:  ## Let ruff put the code into shape
	@.ci/venv dev
	@$(PYTHON) -m ruff check --fix-only --quiet .
	@$(PYTHON) -m ruff format .

docs:  ## Build the documentation into docs/_build, warnings are errors
	@.ci/venv docs
	@$(PYTHON) -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "Built docs/_build/index.html"

benchmark:  ## Print runs/s, steps/s and latencies beside the physical limit
	@.ci/venv test
	@$(PYTHON) -m tests.benchmarks $(ARGS)

clean:  ## Remove what these commands made
	rm -rf .venv .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist docs/_build mails accounting db.sqlite3* demo*.sqlite3*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
