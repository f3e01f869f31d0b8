#!/usr/bin/env bash
# Everything that has to hold before a change lands: style, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
pytest -q "$@"
