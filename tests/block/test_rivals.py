"""The simple fusions: against their formulas, and in front of a projector."""

import pytest
import torch
from blocks import SIMPLE, fused_projector, projector

from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.config import MMFuserConfig
from llava_mmfuser.projector import MMFuserProjector


def test_formulas():
    layers = [torch.randn(2, 9, 8) for _ in range(5)]
    stacked = torch.stack(layers)
    features = torch.cat(layers, -1)
    inner = projector()
    for fusion, expected in {
        "mean": inner(stacked.mean(0)),
        "sum": inner(stacked.sum(0)),
        "token_concat": inner(torch.cat(layers, 1)),
    }.items():
        torch.testing.assert_close(fused_projector(fusion, inner=inner)(features), expected)

    weighted = fused_projector("weighted_sum", inner=inner)
    with torch.no_grad():
        weighted.fuser.scale.copy_(torch.tensor([0.5, -1, 2, 0, 3]))
    expected = inner(0.5 * layers[0] - layers[1] + 2 * layers[2] + 3 * layers[4])
    torch.testing.assert_close(weighted(features), expected)


@pytest.mark.parametrize("fusion,num_layers", [("channel_concat", 5), ("dense_channel", 5), ("dense_channel", 4)])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_wide_fusions_are_one_first_layer_over_all_channels(fusion, num_layers, kind):
    """The two stored parts equal a single Linear on the concatenated channels, as the published fusions have it."""
    layers = [torch.randn(2, 9, 8) for _ in range(num_layers)]
    found = fused_projector(fusion, num_layers, kind)
    torch.nn.init.normal_(found.fuser.extra.weight)
    if fusion == "channel_concat":
        others = layers[:-1]
    else:
        half = num_layers // 2
        others = [torch.stack(layers[:half]).mean(0), torch.stack(layers[half:]).mean(0)]
    first = found if kind == "linear" else getattr(found, "0")
    weight = torch.cat([first.weight, found.fuser.extra.weight], 1)
    expected = torch.nn.functional.linear(torch.cat([layers[-1], *others], -1), weight, first.bias)
    if kind != "linear":
        expected = getattr(found, "2")(torch.nn.functional.gelu(expected))
    torch.testing.assert_close(found(torch.cat(layers, -1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_exactly_those_start_as_identity_that_say_so(fusion, dtype):
    inner = projector().to(dtype)
    settings = MMFuserConfig(layers=(1, 2, 3), fusion=fusion, num_heads=2)
    fused = MMFuserProjector.build(settings, 8, inner).to(dtype)
    layers = [torch.randn(2, 9, 8, dtype=dtype) for _ in range(3)]
    out, expected = fused(torch.cat(layers, -1)), inner(layers[-1])
    assert out.dtype == dtype
    assert (out.shape == expected.shape and torch.equal(out, expected)) == FUSIONS[fusion].starts_as_identity


@pytest.mark.parametrize("fusion", SIMPLE)
def test_querys_cls_token_passes_unfused(fusion):
    fused = fused_projector(fusion, 3)
    for parameter in fused.fuser.parameters():
        torch.nn.init.normal_(parameter)
    layers = [torch.randn(2, 10, 8) for _ in range(3)]
    out, inner = fused(torch.cat(layers, -1)), torch.nn.Sequential(*(getattr(fused, name) for name in "012"))
    torch.testing.assert_close(out[:, 0], inner(layers[-1][:, 0]))
    torch.testing.assert_close(out[:, 1:], fused(torch.cat([layer[:, 1:] for layer in layers], -1)))


@pytest.mark.parametrize("fusion", SIMPLE)
def test_every_weight_gets_a_gradient(fusion):
    fused = fused_projector(fusion)
    fused(torch.randn(1, 9, 40)).square().sum().backward()
    for name, parameter in fused.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
