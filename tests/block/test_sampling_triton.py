"""The Triton kernels: on a CUDA device where there is one, in Triton's interpreter on the CPU elsewhere."""

import os

import pytest
import torch
import torch.utils.checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_BEFORE = os.environ.get("TRITON_INTERPRET")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
triton = pytest.importorskip("triton", reason="triton is not installed")

from llava_mmfuser.block import registration  # noqa: E402
from llava_mmfuser.block import sampling as ops  # noqa: E402
from llava_mmfuser.block import sampling_triton as triton_kernels  # noqa: E402
from llava_mmfuser.block.sampling_triton import deformable_sampling, unavailable  # noqa: E402

if _BEFORE is None:
    os.environ.pop("TRITON_INTERPRET", None)  # not for other tests and the processes that they start

_REASON = unavailable(DEVICE, torch.float32)
if DEVICE == "cpu" and isinstance(triton.language.sum, triton.JITFunction):
    _REASON = "something imported triton before its interpreter was asked for"
pytestmark = [pytest.mark.matrix, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]

# Largest deviation from the float64 reference on the same rounded inputs, relative to its largest value. The
# interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAMES = ("output", "value", "offsets", "logits")


def inputs(batch=2, grid=(3, 4), heads=2, levels=2, points=3, depth=8, spread=2.0, dtype=torch.float32):
    """Sampling places keep off integers, where the bilinear kernel has kinks and its gradient is either side's."""
    cells = grid[0] * grid[1]
    value = torch.randn(batch, levels * cells, heads, depth).to(dtype)
    offsets = (torch.randn(batch, cells, heads, levels, points, 2) * spread).floor()
    offsets = (offsets + torch.randint(1, 8, offsets.shape) / 8).to(dtype)
    logits = torch.randn(batch, cells, heads, levels, points).to(dtype)
    return [tensor.to(DEVICE) for tensor in (value, offsets, logits)]


def run(tensors, grid, sampling=deformable_sampling, needs=(True, True, True)):
    """Output and the gradients that are asked for."""
    tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs)]
    out = sampling(*tensors, grid)
    cotangent = (torch.arange(out.numel(), device=out.device) % 17 - 8) / 8  # exact in every dtype
    out.backward(cotangent.view(out.shape).to(out.dtype))
    return [out.detach()] + [tensor.grad for tensor in tensors]


def reference(tensors, grid):
    return run([tensor.double() for tensor in tensors], grid, lambda *args: ops.deformable_sampling(*args, "reference"))


def assert_equal_up_to_rounding(found, expected, dtype, names=NAMES):
    for name, f, e in zip(names, found, expected):
        assert f.dtype == dtype, name
        assert f.shape == e.shape, name
        assert (f.double() - e).abs().max() <= TOLERANCE[dtype] * e.abs().max(), name


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read again when the first one is run


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CASES = {
    "odd batch": dict(batch=3, heads=1),
    "one sample": dict(batch=1, levels=1, points=1, depth=4),
    "four levels": dict(batch=1, heads=1, levels=4, points=4, depth=64),
    "odd width": dict(batch=1, grid=(5, 2), levels=1, points=4, depth=5),
    "one cell": dict(grid=(1, 1)),
    "one row": dict(grid=(1, 6)),
    "far outside": dict(batch=1, spread=20.0),
    "wide": dict(batch=1, grid=(2, 3), heads=1, depth=200),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_reference(case):
    grid = case.get("grid", (3, 4))
    tensors = inputs(**case)
    assert_equal_up_to_rounding(run(tensors, grid), reference(tensors, grid), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    tensors = inputs(batch=1, dtype=dtype)
    assert_equal_up_to_rounding(run(tensors, (3, 4)), reference(tensors, (3, 4)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_offsets_and_logits_may_be_of_another_type(dtype):
    value, offsets, logits = inputs(batch=1, grid=(2, 3), dtype=torch.float16)
    tensors = [value, offsets.to(dtype), logits.to(dtype)]
    found, expected = run(tensors, (2, 3)), reference(tensors, (2, 3))
    for f, e, kind in zip(found, expected, (torch.float16, torch.float16, dtype, dtype)):
        assert f.dtype == kind
        assert (f.double() - e).abs().max() <= TOLERANCE.get(kind, 1e-5) * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd batch", "odd width", "four levels", "far outside"])
def test_deterministic_gradients_equal_the_reference(name, dtype, deterministic):
    grid = CASES[name].get("grid", (3, 4))
    tensors = inputs(**CASES[name], dtype=dtype)
    torch.use_deterministic_algorithms(False)
    expected = reference(tensors, grid)
    torch.use_deterministic_algorithms(True)
    assert_equal_up_to_rounding(run(tensors, grid), expected, dtype)


def test_deterministic_gradients_are_the_same_bit_by_bit_and_use_no_atomics(deterministic, monkeypatch):
    launches = []
    launch = triton_kernels._launch

    def spy(kernel, *args, **constants):
        launches.append((kernel, constants.get("NEEDS_VALUE")))
        launch(kernel, *args, **constants)

    monkeypatch.setattr(triton_kernels, "_launch", spy)
    tensors = inputs(batch=1)
    first, second = run(tensors, (3, 4)), run(tensors, (3, 4))
    assert all(torch.equal(f, s) for f, s in zip(first, second))
    assert launches[:3] == launches[3:]
    assert launches[:3] == [
        (triton_kernels._forward_kernel, None),
        (triton_kernels._backward_kernel, False),
        (triton_kernels._grad_value_kernel, None),
    ]


def test_empty_batches_keep_their_shape_and_gradients():
    tensors = [tensor[:0] for tensor in inputs()]
    found = run(tensors, (3, 4))
    assert [tuple(tensor.shape) for tensor in found] == [(0, 12, 16)] + [tuple(tensor.shape) for tensor in tensors]


def test_under_activation_checkpointing_and_only_once():
    tensors = [tensor.requires_grad_() for tensor in inputs(batch=1, grid=(2, 2), levels=1)]

    def sampled():
        return deformable_sampling(*tensors, (2, 2))

    calls = sampled, lambda: torch.utils.checkpoint.checkpoint(sampled, use_reentrant=False)
    results = [torch.autograd.grad(call().square().sum(), tensors, create_graph=True) for call in calls]
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(results[0][1].sum(), tensors[0])


def test_views_and_expanded_tensors_are_read_right():
    value, offsets, logits = inputs(batch=1)
    views = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        offsets[:, :1].expand_as(offsets),
        logits.flip(1).transpose(3, 4).contiguous().transpose(3, 4),
    ]
    assert not any(view.is_contiguous() for view in views)
    assert_equal_up_to_rounding(run(views, (3, 4)), reference(views, (3, 4)), torch.float32)
    value.requires_grad_()
    deformable_sampling(value, offsets, logits, (3, 4)).sum().backward()  # its cotangent is expanded
    assert value.grad.isfinite().all() and value.grad.any()


@pytest.mark.parametrize("mode", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)], ids=str
)
def test_only_gradients_that_are_needed_are_computed(needs, mode):
    grid = (2, 3)
    tensors = inputs(batch=1, grid=grid, heads=1)
    before = [tensor.clone() for tensor in tensors]
    expected = reference(tensors, grid)
    try:
        torch.use_deterministic_algorithms(mode)
        found = run(tensors, grid, needs=needs)
    finally:
        torch.use_deterministic_algorithms(False)
    for f, e, need, name in zip(found[1:], expected[1:], needs, NAMES[1:]):
        assert (f is not None) == need
        if need:
            assert_equal_up_to_rounding([f], [e], torch.float32, [name])
    assert all(torch.equal(tensor, b) for tensor, b in zip(tensors, before))


PAD = 4096
SENTINEL = -77.0


@pytest.mark.parametrize("mode", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize(
    "offset", [0.5, -0.5, 1.5, 1e9, 3e38, -3e38, float("inf"), -float("inf"), float("nan"), "mixed"], ids=str
)
def test_nothing_is_read_or_written_out_of_bounds(offset, mode, monkeypatch):
    """Inputs lie between NaN, results between sentinels; the grid has no full block of queries, samples or features."""
    grid = (1, 3)
    value, offsets, logits = inputs(batch=1, grid=grid, heads=1, points=3, levels=1, depth=5)
    if offset == "mixed":
        offsets.view(-1)[::5] = float("nan")
        offsets.view(-1)[1::5] = float("inf")
        offsets.view(-1)[2::5] = -1e30
    else:
        offsets.copy_(offset + torch.arange(6, device=DEVICE).view(3, 2) * 3 / 16)

    def between(tensor, filling):
        buffer = torch.full((tensor.numel() + 2 * PAD,), filling, dtype=tensor.dtype, device=tensor.device)
        buffer[PAD:-PAD] = tensor.reshape(-1)
        return buffer, buffer[PAD:-PAD].view(tensor.shape)

    tensors = [between(tensor, float("nan"))[1] for tensor in (value, offsets, logits)]
    buffers = []

    def allocator(filling):
        def allocate(shape, dtype, device):
            buffer, view = between(torch.full(shape, filling, dtype=dtype, device=device), SENTINEL)
            buffers.append(buffer)
            return view

        return allocate

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", allocator(float("nan")))
        patch.setattr(torch, "zeros", allocator(0.0))
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: mode)
        found = run(tensors, grid)
    assert len(buffers) == 4
    for buffer in buffers:
        assert (buffer[:PAD] == SENTINEL).all() and (buffer[-PAD:] == SENTINEL).all()
        assert buffer[PAD:-PAD].isfinite().all()  # written in full
    if offset in (0.5, -0.5, 1.5):
        assert_equal_up_to_rounding(found, reference([value, offsets, logits], grid), torch.float32)
    elif offset != "mixed":
        assert not any(tensor.any() for tensor in found)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("poisoned", [0, 2], ids=["value", "logits"])
def test_nan_in_value_and_logits_is_passed_on(poisoned):
    tensors = inputs(batch=1, grid=(1, 2), heads=1)
    tensors[poisoned].fill_(float("nan"))
    assert deformable_sampling(*tensors, (1, 2)).isnan().any()


@pytest.fixture
def fresh_check():
    caches = ops.try_triton, ops.choose  # which a test may replace
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("dtype", triton_kernels.DTYPES, ids=str)
def test_right_kernels_pass_the_check_on_the_users_device(dtype, mode, fresh_check, caplog):
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(mode)
    try:
        with torch.inference_mode():
            assert ops.try_triton(torch.device(DEVICE), dtype, mode) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before) and not caplog.records


FAULTS = {
    "output": "output deviates by",
    "value": "value's gradient deviates by",
    "offsets": "offsets' gradient deviates by",
    "logits": "logits' gradient deviates by",
    "compiler": "RuntimeError: ptxas exited with 255",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_kernels_are_noticed_and_not_used(fault, fresh_check, monkeypatch, caplog):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def faulty(value, offsets, logits, grid):
        if fault == "compiler":
            raise RuntimeError("ptxas exited with 255")
        tensors = {"value": value, "offsets": offsets, "logits": logits}
        out = deformable_sampling(*(Doubled.apply(x) if name == fault else x for name, x in tensors.items()), grid)
        return out + (0.01 * out).detach() if fault == "output" else out

    monkeypatch.setitem(ops.IMPLEMENTATIONS, "triton", faulty)
    for _ in range(2):
        assert FAULTS[fault] in ops.try_triton(torch.device(DEVICE), torch.float32, False)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "the sampling runs through F.grid_sample instead" in record.message


def test_check_passes_wherever_the_first_forward_happens(fresh_check):
    """Inside activation checkpointing, and with another default device."""
    problems = []

    def forward(x):
        problems.append(ops.try_triton(torch.device(DEVICE), torch.float32, False))
        return x * x

    x = torch.randn(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).sum().backward()
    ops.try_triton.cache_clear()
    with torch.device("meta"):
        problems.append(ops.try_triton(torch.device(DEVICE), torch.float32, False))
    assert problems == [None] * 3 and torch.allclose(x.grad, 2 * x)


@pytest.mark.parametrize("problem,chosen", [(None, "triton"), ("it is wrong", "reference")])
def test_kernels_are_the_default_on_cuda_where_the_check_passes(problem, chosen, fresh_check, monkeypatch):
    asked = []
    monkeypatch.delenv("LLAVA_MMFUSER_SAMPLING", raising=False)
    monkeypatch.setattr(triton_kernels, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(ops, "try_triton", lambda *arguments: asked.append(arguments) or problem)
    for _ in range(2):
        assert ops.select_implementation("cuda", torch.bfloat16) == chosen
    assert asked == [(torch.device("cuda"), torch.bfloat16, False)]


def test_unavailable_names_what_is_missing(monkeypatch):
    assert unavailable(DEVICE, torch.bfloat16) is None
    assert "not float64" in unavailable(DEVICE, torch.float64)
    with pytest.raises(ValueError, match="not float64"):
        ops.deformable_sampling(*(tensor.double() for tensor in inputs(batch=1)), (3, 4), "triton")
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "triton", None)
        patch.setattr(triton_kernels, "_IMPORT_ERROR", "No module named 'triton'")
        assert unavailable(DEVICE, torch.float32).endswith("cannot be imported: No module named 'triton'")
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_kernels.triton, "__version__", "3.1.0")
        assert "from triton 3.3 on" in unavailable(DEVICE, torch.float32)
        monkeypatch.setattr(triton_kernels.triton, "JITFunction", object)
        assert "need a CUDA device, not cpu" in unavailable(DEVICE, torch.float32)


@pytest.mark.skipif(not registration.SUPPORTED, reason="torch < 2.7 cannot tell torch.compile from export")
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
def test_compiled_graph_runs_the_kernels_as_one_operator(needs, fresh_check, monkeypatch):
    tensors = [tensor.requires_grad_(need) for tensor, need in zip(inputs(batch=1), needs)]
    torch.library.opcheck(triton_kernels._OPERATOR, (*tensors, 3, 4), test_utils=("test_schema", "test_faketensor"))
    monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", "triton")
    launches, launch = [], triton_kernels._launch

    def spy(kernel, *args, **sizes):
        launches.append(kernel)
        launch(kernel, *args, **sizes)

    monkeypatch.setattr(triton_kernels, "_launch", spy)
    torch._dynamo.reset()
    compiled = torch.compile(ops.deformable_sampling, fullgraph=True, backend="aot_eager")
    found = run(tensors, (3, 4), compiled, needs)
    assert launches == [triton_kernels._forward_kernel, triton_kernels._backward_kernel]
    torch.testing.assert_close(found, run(tensors, (3, 4), needs=needs))


@pytest.mark.slow
@pytest.mark.skipif(not registration.SUPPORTED, reason="torch < 2.7 cannot tell torch.compile from export")
def test_check_on_the_users_device_may_run_while_torch_compile_looks(fresh_check, monkeypatch):
    def choose(chosen, *place):
        return "reference" if ops.try_triton(*place) else "triton"

    monkeypatch.setattr(ops, "choose", choose)
    tensors = inputs(batch=1, grid=(2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ops.deformable_sampling(*t), fullgraph=True, backend="aot_eager")
    found = run(tensors, (2, 3), compiled)
    assert ops.try_triton.cache_info().misses == 1
    assert choose("", tensors[0].device, torch.float32, False) == "triton", "the check that ran there passed"
    torch.testing.assert_close(found, run(tensors, (2, 3)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_compiled_fuser_on_a_gpu(mode):
    from llava_mmfuser import MMFuser

    fuser = MMFuser(256, num_layers=3, num_heads=4).to(DEVICE, torch.bfloat16)
    torch.nn.init.normal_(fuser.cross_gate.scale)
    torch.nn.init.normal_(fuser.self_gate.scale)
    compiled, parameters = torch.compile(fuser, fullgraph=True, mode=mode), list(fuser.parameters())
    for _ in range(3):  # warm-up, recording and replay of a CUDA graph
        layers = [torch.randn(2, 64, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        results = []
        for call in (compiled, fuser):
            out = call(layers)
            gradients = torch.autograd.grad(out.square().mean(), parameters)
            results.append([tensor.clone().float() for tensor in (out, *gradients)])
        for found, expected in zip(*results):
            assert (found - expected).abs().max() <= 4e-2 * expected.abs().max()


@pytest.mark.gpu
def test_kernels_are_captured_in_a_cuda_graph_and_replayed():
    grid, tensors = (6, 6), inputs(batch=2, grid=(6, 6), depth=64, dtype=torch.bfloat16)
    deformable_sampling(*tensors, grid)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = deformable_sampling(*tensors, grid)
    for tensor, other in zip(tensors, inputs(batch=2, grid=grid, depth=64, dtype=torch.bfloat16)):
        tensor.copy_(other)
    graph.replay()
    assert torch.equal(out, deformable_sampling(*tensors, grid))


SHAPES = {
    "LLaVA-1.5": dict(batch=4, grid=(24, 24)),
    "64 images": dict(batch=64, grid=(24, 24), heads=4),
    "one level": dict(batch=16, grid=(24, 24), levels=1),
    "SigLIP": dict(batch=2, grid=(27, 27), depth=72),
    "672 pixels": dict(batch=1, grid=(48, 48)),
    "odd": dict(batch=3, grid=(29, 31), heads=5, levels=3, points=3, depth=40),
    "far outside": dict(batch=2, grid=(24, 24), spread=1000.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_real_shapes_on_a_gpu(shape, dtype, mode):
    grid = shape["grid"]
    tensors = inputs(**{"heads": 16, "levels": 4, "points": 4, "depth": 64, **shape}, dtype=dtype)
    expected = reference(tensors, grid)
    try:
        torch.use_deterministic_algorithms(mode)
        found = run(tensors, grid)
        again = run(tensors, grid)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_up_to_rounding(found, expected, dtype)
    for index, (f, a) in enumerate(zip(found, again)):
        assert torch.equal(f, a) or index == 1 and not mode  # atomics add in any order
