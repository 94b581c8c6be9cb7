"""scripts/gpu_check.sh where there is no GPU: it runs through, says so, and a failure is a line and an exit status.

`gpu_check` imports triton, which test_sampling_triton.py has to do first, and so is imported by the tests themselves.
"""

import json

import benchmark
import host
import pytest
import torch
from versions import TORCH

KERNELS = {"_forward_kernel", "_backward_kernel", "_grad_value_kernel"}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes twenty minutes")


@NO_GPU
@pytest.mark.slow
def test_everything_runs_through_at_tiny_sizes(tmp_path):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    file = tmp_path / "found.json"
    environment = host.environment(PYTHON=host.sys.executable)
    done = host.run(["bash", host.ROOT / "scripts" / "gpu_check.sh", "--json", file], env=environment)
    assert "No GPU was found" in done.stdout
    found = json.loads(file.read_text())
    passed = {name: passed for name, passed, _ in found["results"]}
    assert passed["tests"] is True
    interpreted = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
    for name in ("kernels' own check, float32", "fuser against the definition, float32", "compiled kernels"):
        assert passed[name] is (True if interpreted else None), done.stdout
    assert {row["kernel"] for row in found["compiled"]} == (KERNELS if interpreted else set())
    parts = {row["part"] for row in found["rows"]}
    assert {"op forward, B=1", "fuser forward, B=1", "LLaVA training step, B=1"} < parts
    bfloat16 = TORCH >= (2, 2)  # before, gloo has none
    assert passed["ZeRO-2"] is (True if bfloat16 else None) and ("ZeRO-2 training step, B=1" in parts) is bfloat16
    assert not any(passed.get(name) for name in ("op forward", "LLaVA training step")), "nothing is judged on a CPU"


@NO_GPU
def test_failure_of_a_part_is_a_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    import gpu_check

    def broken(size):
        yield gpu_check.Result("first", True, "well")
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check, "PARTS", {"broken": broken, "bounds": lambda size: gpu_check.bounds() or []})
    for name in ("DEVICE", "WIDTH", "HEADS", "GRID"):
        monkeypatch.setattr(benchmark, name, getattr(benchmark, name))
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--json", str(tmp_path / "found.json")])
    assert gpu_check.main() == 1
    assert "FAIL broken: RuntimeError: no kernel image" in capsys.readouterr().out
    assert ["first", True, "well"] in json.loads((tmp_path / "found.json").read_text())["results"]


def test_launches_to_compile_are_those_of_the_package():
    pytest.importorskip("triton", reason="triton is not installed")
    import gpu_check

    launches = gpu_check.recorded_launches(torch.bfloat16, 4, 64, deterministic=True)
    assert {kernel.fn.__name__ for kernel, *_ in launches} == KERNELS and len(launches) == 3
    for _, tensors, constants in launches:
        assert all(tensor.is_meta for tensor in tensors)
        assert constants["HEADS"] == 16 and constants["num_warps"] >= 1
