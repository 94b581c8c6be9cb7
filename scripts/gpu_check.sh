#!/bin/bash
# Whether this machine's GPU runs the fuser right and fast: the kernels' tests, the tests marked gpu, compute-sanitizer
# where it is installed, then the benchmark with its targets. Attach gpu_check.json and what is printed to an issue.
#   bash scripts/gpu_check.sh [arguments of benchmark.py …]        without a GPU: tiny sizes, which judges no GPU
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
kernels=tests/block/test_sampling_triton.py
failed=()
part() { # name, command …
    echo "== $1"
    "${@:2}" || failed+=("$1")
}
pytest=("$python" -m pytest -q -p no:cacheprovider -rf)

part "what runs here" "$python" -m llava_mmfuser status
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    part "tests of the kernels" "${pytest[@]}" $kernels
    part "tests on a GPU" "${pytest[@]}" -m gpu tests/scripts/test_gpu.py
    if command -v compute-sanitizer >/dev/null; then
        part "compute-sanitizer" compute-sanitizer --tool memcheck --error-exitcode 3 --target-processes all \
            "${pytest[@]}" $kernels -k "out_of_bounds or empty or (odd and width)"
    fi
    sizes=()
else
    part "tests of the kernels" "${pytest[@]}" $kernels -k "test_output_and_gradients_equal_the_reference and one and cell"
    sizes=(--tiny)
    echo "No GPU was found: this runs on the CPU and judges no GPU."
fi
part "benchmark" "$python" scripts/benchmark.py ${sizes[@]+"${sizes[@]}"} --targets --json gpu_check.json "$@"
echo "== failed: ${failed[*]:-nothing}"
exit $((${#failed[@]} > 0))
