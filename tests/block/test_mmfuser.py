import math

import paper
import pytest
import torch
from blocks import HALF_TOLERANCE, awake, close, maps

from llava_mmfuser import MMFuser
from llava_mmfuser.block.kinds import ATTENTION_KINDS


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


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_training_wakes_the_gates_and_then_everything_learns(kind):
    fuser = MMFuser(16, 3, 4, attention=kind)
    layers, target = [layer.detach() for layer in maps(3, dtype=torch.float32)], torch.randn(2, 16, 16)
    before = {name: parameter.detach().clone() for name, parameter in fuser.named_parameters()}
    optimizer = torch.optim.Adam(fuser.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (fuser(layers) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in fuser.named_parameters())


def test_parameter_names_survive_transformers_peft_and_llava():
    names = [name for name, _ in MMFuser(16, 3, 4).named_parameters()]
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
