"""Runs LLaVA's unmodified train.py and loaders on tiny models, in subprocesses, as a user would."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "scripts")]  # conftest may not have done so

import warm  # noqa: E402
from toy.recipe import train_arguments, train_py  # noqa: E402

CONTROLS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LLAVA_MMFUSER_DISABLE")
STARTED_IN = dict(os.environ)  # before a Trainer in this process adds to it
OF_THE_TESTS = ("PYTEST_CURRENT_TEST", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")  # set by pytest and by scikit-learn


def environment(**extra):
    """The environment that the tests were started in, without launcher variables, offline, one thread, plus `extra`.

    None in `extra` leaves a variable as it is.
    """
    env = {key: value for key, value in STARTED_IN.items() if key not in CONTROLS + OF_THE_TESTS}
    env.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        WANDB_DISABLED="true",
        PYTHONPATH="",
        TRANSFORMERS_VERBOSITY="error",
    )
    env.update({key: value for key, value in extra.items() if value is not None})
    return env


USUAL = environment()


def start(command, stdout, env=None, cwd=None):
    """Start a command in a session of its own; `stop` it. A fork of a warm interpreter where that is the same."""
    command, env = [str(part) for part in command], env or environment()
    if warm.runs(command, env, USUAL):
        return warm.Process(command, env, cwd, stdout)
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(process):
    """SIGKILL what is left of a process that was started, and of what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command, check=True, env=None, cwd=None, timeout=600):
    """Run a command; on failure show its last output. Nothing that it started outlives it."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = start(command, output, env, cwd)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            late = process.poll() is None
        finally:
            stop(process)
        output.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, output.read())
    if late or (check and done.returncode):
        reason = f"not done after {timeout} s" if late else f"exit {done.returncode}"
        raise AssertionError(f"{' '.join(map(str, command))}\n{reason}\n{done.stdout[-6000:]}")
    return done


def train(world, output, stage="pretrain", launcher=None, env=None, check=True, **options):
    """Train through upstream's train.py; `launcher` is what stands before the script (default: this Python)."""
    command = (launcher or [sys.executable]) + [train_py()] + train_arguments(world, output, stage, **options)
    return run(command, env=env, check=check)


def shared(factory):
    """A folder that the workers of these tests have in common; `factory` makes pytest's own."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def once(output, make):
    """`output` after make(output) by the worker of these tests that comes first; the others wait for it."""
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            try:
                make(output)
            except BaseException:
                shutil.rmtree(output, ignore_errors=True)
                raise
    return output


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def zero(folder, stage):
    """Write upstream's ZeRO configuration, with whole numbers for the bucket sizes, which newer pydantic demands."""
    settings = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 500000}
    if stage == 3:
        settings.update(
            stage3_prefetch_bucket_size=50000,
            stage3_param_persistence_threshold=1000,
            stage3_gather_16bit_weights_on_model_save=True,
        )
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto")
    file = Path(folder) / f"zero{stage}.json"
    part = file.with_suffix(f".{os.getpid()}")  # another worker may be reading it
    part.write_text(json.dumps({**auto, "bf16": {"enabled": "auto"}, "zero_optimization": settings}))
    return part.replace(file)


def deepspeed_command(world, output, configuration, stage="pretrain", launcher=None, **options):
    """Two ranks on the CPU, and their environment; `launcher` is what starts them (default: forks, see ranks.py)."""
    options.setdefault("use_cpu", None)  # with --use_cpu, accelerate does not use DeepSpeed at all
    arguments = train_arguments(world, output, stage, deepspeed=configuration, **options)
    command = (launcher or [sys.executable, HERE / "ranks.py", "2"]) + [HERE / "deepspeed_cpu.py"] + arguments
    return command, environment(DS_ACCELERATOR="cpu")


def deepspeed_launcher():
    """DeepSpeed's own launcher, which starts each rank afresh, with two ranks."""
    if not shutil.which("numactl"):
        pytest.skip("numactl is missing, which DeepSpeed's launcher asks about a CPU's cores")
    return [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", free_port()]


def deepspeed(world, output, configuration, stage="pretrain", env=None, **options):
    """As `train`, with two ranks under ZeRO; their trained weights are compared at the end."""
    command, environ = deepspeed_command(world, output, configuration, stage, **options)
    done = run(command, env={**environ, **(env or {})})
    level = json.loads(Path(configuration).read_text())["zero_optimization"]["stage"]
    assert done.stdout.count(f"trains under ZeRO stage {level}") == 2, done.stdout[-3000:]
    assert done.stdout.count("weights are the same on all ranks") == 2, done.stdout[-3000:]
    return done


def losses(output):
    """The logged training losses of a run."""
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def python(code, env=None, check=True):
    """Run Python code in an interpreter of its own and return what it printed last."""
    return run([sys.executable, "-c", code], env=env, check=check)
