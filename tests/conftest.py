import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "host")]

from versions import TORCH  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "fp16_cpu: needs fp16 matrix products on the CPU, which torch 2.1.2 lacks")
    config.addinivalue_line(
        "markers", "deepspeed_cpu: needs DeepSpeed on the CPU, where 0.12.6 wants Intel's extension"
    )
    config.addinivalue_line("markers", "bitsandbytes: 4 and 8 bits on the CPU")
    config.addinivalue_line("markers", "gloo_bf16: two ranks on the CPU in bf16")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "serve: LLaVA's own serving, all of it in scripts/test.sh serve")
    config.addinivalue_line("markers", "slow: not in scripts/test.sh quick")
    config.addinivalue_line("markers", "matrix: on the current stack only; another case stands for it elsewhere")


def pytest_collection_modifyitems(items):
    reasons = {
        "gloo_bf16": (TORCH < (2, 2), "gloo in torch 2.1 cannot broadcast bf16, and fp16 does not run on the CPU"),
        "fp16_cpu": (TORCH < (2, 2), "fp16 matrix products on the CPU need torch >= 2.2"),
        "deepspeed_cpu": (TORCH < (2, 2), "DeepSpeed 0.12.6 on the CPU needs intel_extension_for_pytorch"),
        "bitsandbytes": (TORCH < (2, 4), "bitsandbytes with kernels for the CPU needs a newer torch"),
        "gpu": (not torch.cuda.is_available(), "no CUDA device"),
    }
    for item in items:
        for name, (applies, reason) in reasons.items():
            if applies and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _variables():
    """Trainers, the toy and libraries set variables in this process, which are not for the tests that follow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def interrupted_start(monkeypatch):
    """Ctrl-C inside `subprocess.Popen`, when a process runs and nobody has it yet; all that were started."""
    started, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    yield started
    signal.signal(signal.SIGINT, before)
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with `data`, `llama` and `clip`: all that train.py needs, tiny and random."""
    import host
    from toy import models, pictures

    def make(folder):
        pictures.make_dataset(folder / "data")
        models.make_llama(folder / "llama", hidden_size=64)
        models.make_clip(folder / "clip")

    return host.once(host.shared(tmp_path_factory) / "world", make)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command of the package in this process: exit code, stdout, stderr."""
    from llava_mmfuser import __main__ as command_line

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava_mmfuser", *map(str, arguments)])
        capsys.readouterr()
        code = command_line.main()
        return (code, *capsys.readouterr())

    return call
