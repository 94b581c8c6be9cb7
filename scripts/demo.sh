#!/usr/bin/env bash
# Makes a vision tower that forgets numbers, trains a tiny LLaVA on it with LLaVA's own train.py, once with mlp2x_gelu and
# once with mmfuser, and asks both about held-out pictures.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$repo/.demo
here=0
arguments=()

usage() {
    cat <<TEXT
usage: scripts/demo.sh [--here] [--output DIR] [-- ARGUMENTS OF demo.py]

  --here        use the active python instead of making an environment
  --output DIR  where the environment, data, models and result go (default: .demo)

Set PYTHON to choose the interpreter (default: python3; tried with 3.11).
TEXT
}

while [ $# -gt 0 ]; do
    case $1 in
        --here) here=1; shift ;;
        --output) [ $# -ge 2 ] || { usage >&2; exit 2; }; output=$2; shift 2 ;;
        --help|-h) usage; exit 0 ;;
        --) shift; arguments=("$@"); break ;;
        *) echo "demo.sh: unknown option: $1" >&2; usage >&2; exit 2 ;;
    esac
done

say() { printf '\n== [%3ds] %s\n' "$SECONDS" "$*"; }

mkdir -p "$output"
output=$(cd "$output" && pwd)

requirements=(
    torch==2.13.0 transformers==4.37.2 tokenizers==0.15.1 accelerate==0.34.2 'peft<0.12' 'numpy<2' deepspeed==0.16.9
    sentencepiece einops pillow requests scikit-learn scikit-image matplotlib
)
llava=llava-torch==1.2.2.post1

if [ $here = 1 ]; then
    python=${PYTHON:-python3}
    "$python" - <<'CHECK'
import importlib.util
import sys

wanted = {
    "llava": "install LLaVA, or: pip install --no-deps llava-torch==1.2.2.post1",
    "llava_mmfuser": "pip install -e .",
    "deepspeed": "pip install deepspeed (LLaVA imports it when it saves)",
    "sentencepiece": "pip install sentencepiece",
    "sklearn": "pip install scikit-learn",
    "skimage": "pip install scikit-image",
    "matplotlib": "pip install matplotlib",
}
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
for name in missing:
    print(f"demo.sh --here: {sys.executable} has no {name}: {wanted[name]}", file=sys.stderr)
sys.exit(bool(missing))
CHECK
else
    environment=$output/env
    python=$environment/bin/python
    stamp=$environment/requirements.txt
    wanted=$(printf '%s\n' "${requirements[@]}" "$llava" "$repo")
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        say "Environment: reusing $environment"
    else
        say "Environment: making $environment (a few minutes, once)"
        rm -rf "$environment"
        "${PYTHON:-python3}" -m venv "$environment" ||
            { echo "demo.sh: python's venv module is missing (Debian: apt install python3-venv)" >&2; exit 1; }
        pip=("$python" -m pip --disable-pip-version-check install --progress-bar off)
        say "Installing torch, transformers and what LLaVA needs"
        "${pip[@]}" "${requirements[@]}" | grep --line-buffered -v '^Requirement already'
        say "Installing LLaVA ($llava) and this repository"
        "${pip[@]}" --no-deps "$llava"
        "${pip[@]}" -e "$repo"
        printf '%s\n' "$wanted" > "$stamp"
    fi
fi

# Threads that spin while they wait make every step four times slower when something else uses the cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

say "Training and comparing"
exec "$python" "$repo/scripts/demo.py" --output "$output" --elapsed "$SECONDS" ${arguments[@]+"${arguments[@]}"}
