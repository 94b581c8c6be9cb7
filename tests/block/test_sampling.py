import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llava_mmfuser.block import sampling as ops
from llava_mmfuser.block.sampling import IMPLEMENTATIONS, deformable_sampling, select_implementation, unavailable

PYTORCH = [name for name in IMPLEMENTATIONS if name != "triton"]  # which has tests of its own
FAST = [name for name in PYTORCH if name != "reference"]
# Largest deviation from the float64 reference, relative to its largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(batch=2, grid=(5, 5), heads=4, levels=2, points=3, depth=8, spread=4.0, dtype=torch.float64):
    tokens = grid[0] * grid[1]
    value = torch.randn(batch, levels * tokens, heads, depth, dtype=dtype)
    offsets = (torch.randn(batch, tokens, heads, levels, points, 2, dtype=torch.float64) * spread).to(dtype)
    logits = torch.randn(batch, tokens, heads, levels, points, dtype=dtype)
    return value, offsets, logits


def run(tensors, grid, implementation):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = deformable_sampling(*tensors, grid, implementation)
    cotangent = (torch.arange(out.numel()) % 17 - 8) / 8  # exact in every dtype
    out.backward(cotangent.view(out.shape).to(out.dtype))
    return [out.detach()] + [tensor.grad for tensor in tensors]


@pytest.fixture
def fresh_choice():
    ops.choose.cache_clear()
    yield
    ops.choose.cache_clear()


def deviation(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(batch=3, levels=1, points=1),
        dict(levels=4, points=4, heads=1),
        dict(grid=(1, 1)),
        dict(grid=(3, 7)),
        dict(spread=100.0),
        dict(batch=1, depth=1),
    ],
    ids=["plain", "odd batch", "four levels", "one cell", "oblong", "far outside", "width one"],
)
def test_fast_path_equals_the_reference(implementation, dtype, case):
    grid = case.get("grid", (5, 5))
    tensors = inputs(**case, dtype=torch.float64)
    expected = run(tensors, grid, "reference")
    found = run([tensor.to(dtype) for tensor in tensors], grid, implementation)
    for name, f, e in zip(("output", "value", "offsets", "logits"), found, expected):
        limit = TOLERANCE[dtype] * (1 if name == "output" or dtype == torch.float64 else 10)
        assert f.dtype == dtype
        assert e.abs().max() == 0 and f.abs().max() == 0 or deviation(f, e) < limit, name


@pytest.mark.parametrize("implementation", PYTORCH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(implementation, dtype):
    value, offsets, logits = inputs(dtype=dtype)
    # Rounded offsets often hit integers, where the bilinear kernel has kinks and its gradient is either side's.
    offsets = (offsets.double().floor() + torch.randint(1, 4, offsets.shape) / 4).to(dtype)
    tensors = (value, offsets, logits)
    expected = run([tensor.double() for tensor in tensors], (5, 5), "reference")
    found = run(tensors, (5, 5), implementation)
    for f, e in zip(found, expected):
        assert f.dtype == dtype
        assert deviation(f, e) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", PYTORCH)
def test_gradients_match_finite_differences(implementation):
    value, offsets, logits = inputs(batch=1, grid=(3, 3), heads=2, levels=2, points=2, depth=2, spread=1.0)
    distance = (offsets - offsets.round()).abs().clamp(min=1e-9)
    offsets = torch.where(distance < 1e-2, offsets + 0.05, offsets)  # the bilinear kernel has kinks at integers
    tensors = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
    assert torch.autograd.gradcheck(lambda *t: deformable_sampling(*t, (3, 3), implementation), tensors)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("offset", [float("inf"), -float("inf"), 1e30, -1e30])
def test_huge_offsets_read_zero(implementation, offset):
    value, offsets, logits = inputs(dtype=torch.float32)
    out = deformable_sampling(value, torch.full_like(offsets, offset), logits, (5, 5), implementation)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("implementation", PYTORCH)
@pytest.mark.parametrize("poisoned", [0, 1, 2], ids=["value", "offsets", "logits"])
def test_nan_never_crashes_and_value_and_logits_pass_it_on(implementation, poisoned):
    tensors = list(inputs(dtype=torch.float32))
    tensors[poisoned] = torch.full_like(tensors[poisoned], float("nan"))
    out = deformable_sampling(*tensors, (5, 5), implementation)
    assert poisoned == 1 or out.isnan().any()


@pytest.mark.parametrize("implementation", FAST)
def test_works_on_empty_batches_and_views(implementation):
    value, offsets, logits = inputs()
    assert deformable_sampling(value[:0], offsets[:0], logits[:0], (5, 5), implementation).shape == (0, 25, 32)
    tensors = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        offsets[:1].expand_as(offsets),
        logits.flip(0).flip(0),
    ]
    expected = deformable_sampling(*(tensor.contiguous() for tensor in tensors), (5, 5), "reference")
    torch.testing.assert_close(deformable_sampling(*tensors, (5, 5), implementation), expected)


def test_backward_is_deterministic_and_differentiable_once():
    value, offsets, logits = (tensor.detach().requires_grad_() for tensor in inputs())
    gradients = []
    for _ in range(3):
        out = deformable_sampling(value, offsets, logits, (5, 5), "embedding_bag")
        gradients.append(torch.autograd.grad(out.square().sum(), (value, offsets, logits)))
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))
    out = deformable_sampling(value, offsets, logits, (5, 5), "embedding_bag")
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    for tensor in (value, offsets, logits):
        with pytest.raises(RuntimeError, match="only once .* set LLAVA_MMFUSER_SAMPLING=reference"):
            torch.autograd.grad(grad.sum(), tensor, retain_graph=True)


@pytest.mark.parametrize("implementation", PYTORCH)
def test_saved_tensors_may_be_recomputed_or_packed(implementation):
    tensors = [tensor.requires_grad_() for tensor in inputs()]

    def sampled():
        return deformable_sampling(*tensors, (5, 5), implementation)

    def packed():
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
            return sampled()

    calls = sampled, packed, lambda: checkpoint(sampled, use_reentrant=False)
    expected, *others = (torch.autograd.grad(call().square().sum(), tensors) for call in calls)
    for found in others:
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_is_part_of_a_graph_is_the_reference(monkeypatch):
    monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", "embedding_bag")
    value, offsets, logits = inputs()
    graph = torch.jit.trace(lambda *tensors: deformable_sampling(*tensors, (5, 5)), (value, offsets, logits))
    assert "grid_sampler" in str(graph.graph)
    with pytest.raises(ValueError, match="implementation='embedding_bag' cannot run here: PyTorch makes a graph"):
        torch.jit.trace(lambda *tensors: deformable_sampling(*tensors, (5, 5), "embedding_bag"), inputs())


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_needed_gradients_are_computed(needed):
    tensors = [tensor.detach().requires_grad_(flag) for tensor, flag in zip(inputs(), needed)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found, expected = (
        torch.autograd.grad(deformable_sampling(*tensors, (5, 5), name).square().sum(), wanted)
        for name in ("embedding_bag", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_implementation_that_cannot_run_here_is_refused_by_name():
    value, offsets, logits = inputs()
    with pytest.raises(ValueError, match="implementation='triton' cannot run here: the Triton kernels (need|take)"):
        deformable_sampling(value.double(), offsets, logits, (5, 5), "triton")
    assert (
        unavailable("embedding_bag", torch.device("cuda"), torch.float32)
        == "embedding_bag is for the CPU, not for cuda"
    )
    assert unavailable("reference", torch.device("cuda"), torch.float32) is None
    with pytest.raises(ValueError, match="they must be on one device"):
        deformable_sampling(value, offsets.to("meta"), logits, (5, 5))


def test_predicate_and_unknown_names(monkeypatch, fresh_choice):
    assert select_implementation(torch.device("cpu")) == "embedding_bag"
    monkeypatch.setattr("llava_mmfuser.block.sampling_triton.unavailable", lambda device, dtype: "no CUDA device")
    assert select_implementation(torch.device("cuda"), torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match="implementation='quick' is not known; use reference or embedding_bag"):
        deformable_sampling(*inputs(), (5, 5), "quick")


def test_choice_is_made_once_per_device_dtype_variable_and_mode(monkeypatch, fresh_choice):
    asked = []
    monkeypatch.setattr(ops, "unavailable", lambda *arguments: asked.append(arguments))
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            for chosen in ("reference", "embedding_bag"):
                monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", chosen)
                assert select_implementation("cpu", dtype) == chosen
    assert len(asked) == 4


def test_shapes_that_do_not_belong_together_are_refused():
    value, offsets, logits = inputs()
    with pytest.raises(ValueError, match="must be"):
        deformable_sampling(value, offsets, logits[..., :1], (5, 5))
    with pytest.raises(ValueError, match=r"grid=\(4, 5\) has 20 cells"):
        deformable_sampling(value, offsets, logits, (4, 5))


def test_variable_picks_the_implementation_or_says_why_not(monkeypatch):
    monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", "reference")
    assert select_implementation(torch.device("cpu")) == "reference"
    monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", "embedding_bag")
    with pytest.raises(
        ValueError, match="LLAVA_MMFUSER_SAMPLING=embedding_bag cannot run here: .* not for cuda; unset"
    ):
        select_implementation(torch.device("cuda"))
    monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", "fast")
    with pytest.raises(ValueError, match="LLAVA_MMFUSER_SAMPLING=fast is not known; use reference or embedding_bag or"):
        deformable_sampling(*inputs(), (5, 5))
