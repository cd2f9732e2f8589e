# Short names for what .ci/run does. Every tool's version comes from uv.lock.
.PHONY: check lint format types layers spelling docs quick test wheel

# Before each commit, under three minutes: everything but the slow half of the tests.
check: lint types layers spelling quick

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

# The quantizer, the losses, the data, composition and the command line.
quick:
	uv run pytest tests/quantization tests/distillation tests/data tests/test_composition.py tests/test_cli.py

# Builds the wheel and uses it from an empty environment.
wheel:
	bash .ci/try_wheel
