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


# Launches of a forward and backward of LLaVA-1.5's shapes, which are recorded and compiled, not run.
COMPILE = """if True:
    import pathlib, re, subprocess, tempfile
    from unittest import mock
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from llava_mmfuser.block import sampling_triton as kernels

    kinds, found = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}, []
    shapes = (16, 4 * 576, 16, 64), (16, 576, 16, 4, 4, 2), (16, 576, 16, 4, 4)
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    record = lambda kernel, programs, tensors, **constants: found.append((kernel, tensors, constants))
    with mock.patch.object(kernels, "_launch", record):
        for deterministic in (False, True):
            with mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: deterministic):
                out = kernels._forward(*inputs, (24, 24))
                kernels._gradients((True, True, True), torch.empty_like(out), *inputs, (24, 24))
    tool = pathlib.Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, tensors, constants in found:
        options = dict(num_warps=constants.pop("num_warps"), num_stages=1)
        types = [kinds[tensor.dtype] for tensor in tensors]
        types += ["constexpr"] * (len(kernel.arg_names) - len(types))
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(tensors))}
        source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), constants, aligned)
        for capability in (80, 90):
            binary = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
            print(kernel.__name__, capability, re.search(r"STACK:(\\d+)", usage)[1])
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_there_and_hardly_spill():
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("the compiler's interface is that of triton 3.3")
    rows = [line.split() for line in host.python(COMPILE).stdout.splitlines() if line.startswith("_")]
    kernels = {"_forward_kernel", "_backward_kernel", "_grad_value_kernel"}
    assert {(name, sm) for name, sm, _ in rows} == {(name, sm) for name in kernels for sm in ("80", "90")}
    assert max(int(stack) for *_, stack in rows) <= 64, rows


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
