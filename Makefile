# Short names for what .ci/run does. Every tool's version comes from uv.lock.
.PHONY: check lint format types layers spelling docs test

check: lint types layers spelling test

lint:
	uv run ruff check .
	uv run ruff format --check .

format:
	uv run ruff check --fix .
	uv run ruff format .

types:
	uv run pyright

layers:
	uv run lint-imports

spelling:
	uv run codespell

docs:
	uv run sphinx-build -q -W --keep-going -b html docs docs/_build/html

test:
	uv run pytest
