#!/usr/bin/env bash
# Does the fuser help in the toy? The design is in docs/study.md; the same command again goes on where it stopped.
#   bash scripts/study.sh [--quick] [--output DIR]      default: .study; with the environment of demo.sh, or PYTHON
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repo/.demo/env/bin/python}
[ -x "$(command -v "$python")" ] ||
    { echo "study.sh: no $python; run scripts/demo.sh once, or set PYTHON to one that has LLaVA" >&2; exit 2; }
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec "$python" "$repo/scripts/study.py" "$@"
