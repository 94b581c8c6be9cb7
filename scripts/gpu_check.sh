#!/bin/bash
# Whether this machine's GPU runs the fuser right and fast, in one table and one JSON to attach to an issue.
#   bash scripts/gpu_check.sh [--parts PART …] [--json FILE] …      (see --help; without a GPU: tiny sizes on the CPU)
set -euo pipefail
cd "$(dirname "$0")/.."
# Without a GPU the kernels run in Triton's interpreter, which has to be asked for before anything imports triton.
if ! "${PYTHON:-python3}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export TRITON_INTERPRET=1
fi
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
