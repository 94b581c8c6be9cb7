#!/bin/bash
# Scores a checkpoint by lmms-eval and prints one table beside the paper's row, see docs/evaluation.md:
#   bash scripts/evaluate.sh CKPT [SUITE or lmms-eval task …] [--against CKPT2] [--base BASE] [lmms-eval's flags …]
# Run it with the Python that has LLaVA, the active one or PYTHON=…; nothing is installed there.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/score.py" "$@"
