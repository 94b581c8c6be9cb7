"""What only a GPU can show, and scripts/gpu_check.sh, which runs it and the benchmark. See also tests/block."""

import functools
import json
import sys

import benchmark
import host
import pytest
import torch

from llava_mmfuser.block import sampling as ops

GPU = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_fuser_on_the_kernels_equals_the_definition_in_output_and_gradients(dtype):
    fuser, layers = benchmark.fuser_and_layers(benchmark.Case(GPU, dtype, 2))
    for attention in (fuser.cross_attn, fuser.self_attn):  # off the integers, where the bilinear kernel has kinks
        attention.sampling_offsets.bias.data += 3 / 8
    results, cotangent = [], torch.randn_like(layers[-1])
    for implementation in ("triton", "reference"):
        sampling = functools.partial(ops.deformable_sampling, implementation=implementation)
        out = benchmark.on(sampling, lambda: fuser(layers))()
        results.append([out, *torch.autograd.grad(out, list(fuser.parameters()), cotangent)])
    for found, expected in zip(*results):
        # Two layers of attention, their projections and sums of gradients over all queries in dtype.
        limit = 8 * ops.TOLERANCE[dtype] * expected.double().abs().max().clamp(min=1e-6)
        assert (found.double() - expected.double()).abs().max() <= limit


@pytest.mark.gpu
def test_a_forward_of_one_image_launches_at_most_25_kernels():
    fuser, layers = benchmark.fuser_and_layers(benchmark.Case(GPU, torch.bfloat16, 1))
    with torch.no_grad():
        fuser(layers)
        with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity)[:2]) as profile:
            fuser(layers)
    assert sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key) <= 25


def test_targets_are_judged_on_a_gpu_only():
    rows = [benchmark.Row("fuser forward, B=1", name, ms, 0, 1) for name, ms in (("fuser", 3), ("one ViT-L block", 2))]
    assert benchmark.judged(rows, True)[2] == (
        "fuser forward",
        False,
        "fuser takes 1.500 of one ViT-L block, at most 1.000",
    )
    assert [passed for _, passed, _ in benchmark.judged(rows, False)] == [None] * 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes twenty minutes")
@pytest.mark.parametrize("python, code", [(sys.executable, 0), ("false", 1)])
def test_gpu_check_runs_through_on_a_cpu_and_names_what_failed(tmp_path, python, code):
    file = tmp_path / "found.json"
    command = ["bash", host.ROOT / "scripts" / "gpu_check.sh", "--parts", "op", "fuser", "vision", "--json", file]
    done = host.run(command, env=host.environment(PYTHON=python), check=False)
    assert done.returncode == code and "judges no GPU" in done.stdout, done.stdout
    if code:
        assert done.stdout.endswith("== failed: what runs here tests of the kernels benchmark\n")
    else:
        assert "== failed: nothing" in done.stdout and "  tower + projector forward: mmfuser takes " in done.stdout
        parts = {row["part"] for row in json.loads(file.read_text())["rows"]}
        assert {"op forward, B=1", "fuser forward, B=1", "tower + projector forward, B=1"} < parts
