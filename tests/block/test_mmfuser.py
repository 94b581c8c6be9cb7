import math

import paper
import pytest
import torch
from blocks import HALF_TOLERANCE, awake, close, maps

from llava_mmfuser import MMFuser, MMFuserConfig, MMFuserProjector
from llava_mmfuser.block.kinds import ATTENTION_KINDS, OUTPUTS, STARTS
from llava_mmfuser.block.leaves import reset


@pytest.mark.parametrize(
    "num_layers,batch,side,heads,points,self_attention,spread",
    [
        (2, 1, 4, 4, 4, True, 2.0),
        (3, 3, 3, 2, 1, True, 2.0),
        (5, 2, 3, 4, 3, True, 2.0),
        (3, 2, 4, 1, 2, False, 2.0),
        (3, 2, 3, 4, 4, True, 50.0),
        (2, 2, 1, 4, 4, True, 2.0),
    ],
    ids=["two maps", "odd batch", "five maps", "cross only", "far outside", "one cell"],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen tower"])
def test_equals_the_equations_in_outputs_and_all_gradients(
    num_layers, batch, side, heads, points, self_attention, spread, frozen
):
    fuser = awake(MMFuser(16, num_layers, heads, points, self_attention=self_attention).double(), spread)
    layers = [layer.requires_grad_(not frozen) for layer in maps(num_layers, batch, side)]
    out = fuser(layers)
    expected = paper.mmfuser(layers, dict(fuser.named_parameters()), heads, points, self_attention)
    assert close(out, expected, 1e-9)

    inputs = ([] if frozen else layers) + list(fuser.parameters())
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for f, w in zip(found, wanted):
        assert close(f, torch.zeros_like(f) if w is None else w, 1e-9)

    single = fuser.float()([layer.float() for layer in layers])
    assert close(single.double(), expected, 1e-5)


@pytest.mark.parametrize("dtype", list(HALF_TOLERANCE), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "answering"])
@pytest.mark.fp16_cpu
def test_half_types_stay_within_the_table(dtype, training):
    fuser = awake(MMFuser(64, 5, 4), spread=0.5, scale=0.1).to(dtype)  # as far as training moves it
    layers = [layer.detach().to(dtype) for layer in maps(5, side=6, width=64)]
    with torch.set_grad_enabled(training):
        out = fuser(layers)
    assert out.dtype == dtype
    expected = fuser.double()([layer.double() for layer in layers])
    assert close(out.double(), expected, HALF_TOLERANCE[dtype])


@pytest.mark.parametrize("levels", [1, 4])
def test_attention_equals_transformers_deformable_detr(levels):
    from transformers.models.deformable_detr.modeling_deformable_detr import multi_scale_deformable_attention

    from llava_mmfuser.block.deformable import DeformableAttention

    side, heads, points, width = 5, 4, 4, 32
    attention = awake(DeformableAttention(width, levels, heads, points).double())
    query = torch.randn(3, side * side, width, dtype=torch.float64, requires_grad=True)
    value = torch.randn(3, levels * side * side, width, dtype=torch.float64, requires_grad=True)
    out = attention(query, value, (side, side))

    index = torch.arange(side * side)
    centre = (torch.stack([index % side, index // side], -1).double() + 0.5) / side
    offsets = attention.sampling_offsets(query).view(3, -1, heads, levels, points, 2)
    locations = centre.view(1, -1, 1, 1, 1, 2) + offsets / side
    weights = attention.attention_weights(query).view(3, -1, heads, levels * points).softmax(-1)
    weights = weights.view(3, -1, heads, levels, points)
    shapes = torch.tensor([[side, side]] * levels)
    sampled = multi_scale_deformable_attention(
        attention.value_proj(value).view(3, -1, heads, width // heads), shapes, locations, weights
    )
    expected = attention.output_proj(sampled)
    assert close(out, expected, 1e-9)
    inputs = [query, value] + list(attention.parameters())
    cotangent = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(result, inputs, cotangent) for result in (out, expected))
    assert all(close(f, w, 1e-9) for f, w in zip(found, wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fresh_block_returns_the_query_layer_bit_for_bit(dtype):
    fuser = MMFuser(64, 5, 16).to(dtype)
    layers = maps(5, side=5, width=64, dtype=dtype)
    assert torch.equal(fuser(layers), layers[-1])


def in_front(inner, num_layers=3, **settings):
    settings = MMFuserConfig(layers=tuple(range(num_layers)), num_heads=4, num_points=2, **settings)
    return MMFuserProjector.build(settings, 16, inner)


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "mlp"])
def test_columns_are_read_beside_the_query_in_outputs_and_all_gradients(self_attention, linear):
    """One wider first layer on [F_L, F_sa], of which the query's columns are the projector's own."""
    inner = torch.nn.Linear(16, 24) if linear else mlp()
    fused = in_front(inner.double(), output="columns", self_attention=self_attention).double()
    awake(fused.fuser)
    layers = maps(3)
    own = {**dict(fused.fuser.named_parameters()), "cross_gate.scale": torch.ones(16).double()}
    detail = paper.mmfuser(layers, own, 4, 2, self_attention) - layers[-1]
    first = fused if linear else fused[0]
    weight = torch.cat([first.weight, fused.fuser.columns.weight], 1)
    expected = torch.nn.functional.linear(torch.cat([layers[-1], detail], -1), weight, first.bias)
    expected = expected if linear else fused[2](fused[1](expected))
    out = fused(torch.cat(layers, -1))
    assert close(out, expected, 1e-9)
    inputs = [*layers, *fused.parameters()]
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    assert all(close(f, w, 1e-9) for f, w in zip(found, wanted))


def test_cls_passes_the_columns_by():
    inner = mlp()
    fused = in_front(inner, output="columns")
    awake(fused.fuser)
    layers = [torch.randn(2, 17, 16) for _ in range(3)]
    out = fused(torch.cat(layers, -1))
    torch.testing.assert_close(out[:, 0], inner(layers[-1][:, 0]))
    torch.testing.assert_close(out[:, 1:], fused(torch.cat([layer[:, 1:] for layer in layers], -1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_projector_changes_nothing_at_first_unless_it_starts_open(kind, start, output, dtype):
    inner = mlp().to(dtype)
    fused = in_front(inner, attention=kind, start=start, output=output).to(dtype)
    assert fused.fuser.is_identity() == (start == "identity")
    for batch in (1, 3):  # a projector of one picture may round otherwise
        features = torch.randn(batch, 17, 3 * 16, dtype=dtype)[:, 1:]  # a view behind CLS, as LLaVA's
        expected = inner(torch.randn(batch, 17, 16, dtype=dtype)[:, 1:].copy_(features[..., -16:]))
        assert torch.equal(fused(features), expected) == (start == "identity")


@pytest.mark.parametrize("output", OUTPUTS)
def test_who_starts_open_or_reads_columns_looks_at_the_querys_own_cell(output):
    fuser = in_front(mlp(), start="open", output=output).fuser
    layers = maps(3, side=5, dtype=torch.float32)
    places, weights = fuser.samples(layers)
    row, column = torch.arange(25) // 5, torch.arange(25) % 5
    away = (places - torch.stack([column, row], -1).view(1, 25, 1, 1, 1, 2)).abs()
    assert 0 < away.amax() <= 0.25 and torch.all(weights == 1 / 4)
    assert places[0, 0, 0, 0].unique(dim=0).shape[0] == 2, "points at the same place would stay together"
    ring = in_front(mlp()).fuser.samples(layers)[0]
    assert ring[0, 12, :, 0, 0].sub(torch.tensor([2.0, 2.0])).abs().amax() == 1
    if output == "add":
        assert torch.equal(fuser.cross_gate.scale, torch.ones(16))
        assert close(fuser(layers), layers[-1] + fuser.detail(layers), 1e-6)
    else:
        bound = math.sqrt(6 / (16 + 24))
        assert 0.8 * bound < fuser.columns.weight.abs().max() <= bound
    assert fuser.self_gate.scale.count_nonzero() == 0
    assert in_front(mlp(), output="columns").fuser.columns.weight.shape == (24, 16)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("start", STARTS)
def test_weights_that_a_checkpoint_lacks_get_this_starts_values(output, start):
    fuser = in_front(mlp(), start=start, output=output).fuser
    fresh = {name: value.clone() for name, value in fuser.state_dict().items()}
    awake(fuser)
    reset(fuser, fresh)
    for name, value in fuser.state_dict().items():
        drawn = name.endswith("_proj.weight") or (name == "columns.weight" and start == "open")
        assert torch.equal(value, fresh[name]) != drawn, name


def test_frozen_features_need_no_gradient_and_the_norms_learn_all_the_same():
    """The norms' scale and shift go into the projections behind them, so what these read is as frozen as the tower."""
    fuser = awake(MMFuser(16, 3, 4).double())
    layers = [layer.detach() for layer in maps(3)]
    read = []
    for module in (fuser.cross_attn.value_proj, fuser.cross_attn.sampling_offsets, fuser.cross_attn.attention_weights):
        module.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0][0].requires_grad))
    fuser(layers).square().sum().backward()
    assert read == [False] * 3
    for norm in (fuser.feat_norm, fuser.query_norm):
        assert norm.weight.grad.abs().min() > 0 and norm.bias.grad.abs().min() > 0


def test_parameter_count_at_width_1024_is_the_papers():
    assert sum(parameter.numel() for parameter in MMFuser(1024).parameters()) == 5_190_592


def test_initial_values_are_the_papers():
    fuser = MMFuser(64, 5, 8, 4)
    for attention, levels in ((fuser.cross_attn, 4), (fuser.self_attn, 1)):
        assert attention.sampling_offsets.weight.count_nonzero() == 0
        assert (
            attention.attention_weights.weight.count_nonzero() == attention.attention_weights.bias.count_nonzero() == 0
        )
        ring = attention.sampling_offsets.bias.view(8, levels, 4, 2)
        torch.testing.assert_close(ring[:, 0, 3].abs().amax(-1), torch.full((8,), 4.0))
        assert torch.equal(ring, ring[:, :1].expand_as(ring))
        assert torch.atan2(ring[1, 0, 0, 1], ring[1, 0, 0, 0]).item() == pytest.approx(2 * math.pi / 8)
        for linear in (attention.value_proj, attention.output_proj):
            bound = math.sqrt(6 / 128)
            assert linear.weight.abs().max() <= bound and linear.weight.std().item() == pytest.approx(
                bound / 3**0.5, rel=0.05
            )
            assert linear.bias.count_nonzero() == 0
    for norm in (fuser.query_norm, fuser.feat_norm, fuser.self_norm):
        assert norm.eps == 1e-6 and torch.equal(norm.weight, torch.ones(64)) and norm.bias.count_nonzero() == 0
    assert fuser.cross_gate.scale.count_nonzero() == fuser.self_gate.scale.count_nonzero() == 0


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_training_wakes_the_gates_and_then_everything_learns(kind, output):
    fused = in_front(mlp().requires_grad_(False), attention=kind, output=output)
    fuser, layers, target = fused.fuser, torch.randn(2, 16, 3 * 16), torch.randn(2, 16, 24)
    before = {name: parameter.detach().clone() for name, parameter in fuser.named_parameters()}
    optimizer = torch.optim.Adam(fuser.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (fused(layers) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in fuser.named_parameters())


def test_parameter_names_survive_transformers_peft_and_llava():
    names = [name for output in OUTPUTS for name, _ in in_front(mlp(), output=output).fuser.named_parameters()]
    forbidden = ("gamma", "beta", "mm_projector", "vision_tower", "vision_resampler", "lm_head")
    suffixes = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name in names:
        assert not any(word in name for word in forbidden), name
        assert not any(("." + name).endswith(f".{suffix}.{leaf}") for suffix in suffixes for leaf in ("weight", "bias"))
    assert not list(MMFuser(16, 3, 4).buffers()), "mm_projector.bin is made from named_parameters(): buffers are lost"


@pytest.mark.parametrize("prefix", ["", "0."])
def test_published_names_load(prefix):
    source, fuser = awake(MMFuser(16, 3, 4)), MMFuser(16, 3, 4)
    theirs = {
        "cross_gate.scale": "gamma1",
        "self_gate.scale": "gamma2",
        "self_norm.weight": "norm1.weight",
        "self_norm.bias": "norm1.bias",
    }
    published = {prefix + theirs.get(name, name): value for name, value in source.state_dict().items()}
    assert prefix + "gamma1" in published
    fuser.load_state_dict(published)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in fuser.state_dict().items())


def test_norms_in_float32_and_the_rest_in_bfloat16_work():
    """What LLaVA's bits 4/8 training makes of the block: everything with `norm` in its name is float32."""
    fuser = awake(MMFuser(16, 3, 4)).to(torch.bfloat16)
    for name, module in fuser.named_modules():
        if "norm" in name:
            module.float()
    layers = [layer.detach().to(torch.bfloat16) for layer in maps(3)]
    out = fuser(layers)
    with torch.no_grad():  # another way through the norms
        torch.testing.assert_close(fuser(layers), out, rtol=0.05, atol=0.05 * out.abs().max().item())
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert fuser([layer.float() for layer in layers]).dtype == torch.float32


def test_nan_in_nan_out():
    fuser = awake(MMFuser(16, 3, 4))
    layers = [torch.full_like(layer, float("nan")) for layer in maps(3, dtype=torch.float32)]
    assert fuser(layers).isnan().all()


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(num_layers=1), "num_layers=1 is not allowed"),
        (dict(num_heads=3), "mm_fuser_num_heads=3 does not divide the feature width 16; use one of 1, 2, 4, 8, 16"),
        (dict(num_heads=0), "mm_fuser_num_heads=0"),
        (dict(num_heads=4, num_points=0), "mm_fuser_num_points=0"),
        (dict(attention="sparse"), "mm_fuser_attention='sparse' is not allowed; use deformable"),
        (dict(num_heads=4, output="concat"), "mm_fuser_output='concat' is not allowed; use add or columns"),
        (dict(num_heads=4, start="paper"), "mm_fuser_start='paper' is not allowed; use identity or open"),
        (dict(num_heads=4, output="columns"), "out_features=0 is not allowed; use a whole number from 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MMFuser(16, **settings)


@pytest.mark.parametrize(
    "layers,message",
    [
        ([torch.zeros(1, 4, 16)] * 2, "got 2 feature maps, but this fuser was built for num_layers=3"),
        ([torch.zeros(1, 4, 16), torch.zeros(1, 9, 16), torch.zeros(1, 4, 16)], "alike"),
        ([torch.zeros(1, 6, 16)] * 3, "6 tokens is not square"),
        ([torch.zeros(1, 4, 8)] * 3, r"\[B, N, 16\]"),
    ],
)
def test_feature_maps_that_do_not_fit_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        MMFuser(16, 3, 4)(layers)
