#!/bin/bash
# Evaluates a checkpoint on the paper's suites and prints one table beside the paper's row:
#   bash scripts/evaluate.sh CKPT [SUITE …] [--data DIR] [--llava DIR] …        (--help: everything, --list: what suites need)
# Run it in the environment of LLaVA, from its folder or with --llava. Set PYTHON to choose the interpreter.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/evaluation" "$@"
