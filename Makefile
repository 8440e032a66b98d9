# Every target works in the active virtual environment. The same commands run in CI (.ci/run) and pre-commit.
.PHONY: install test test-slow lint audit fix figures quickstart release

install:
	pip install -c constraints.txt -e '.[quickstart,dev]'

test:
	pytest

test-slow:
	pytest -m slow --timeout 3600

lint:
	ruff format --check .
	ruff check .
	mypy

audit:
	python .ci/audit.py

fix:
	ruff format .
	ruff check --fix .

figures:
	python docs/make_figures.py

quickstart:
	longlora quickstart

release:
	.ci/release
