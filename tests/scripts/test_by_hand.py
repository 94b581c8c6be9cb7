"""scripts/by_hand.py is what the package makes LLaVA compute, and needs nothing of it."""

import sys

import by_hand
import host
import pytest
import torch
from tiny import IMAGES, projector_config, tower
from transformers import CLIPVisionModel

WIDTH, TOKENS_WIDTH = 64, 48


@pytest.fixture
def projector():
    torch.manual_seed(0)
    from llava.model.multimodal_projector.builder import build_vision_projector

    return build_vision_projector(projector_config(mm_hidden_size=WIDTH, hidden_size=TOKENS_WIDTH))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen maps", "trained maps"])
def test_outputs_and_all_gradients_equal_those_of_patched_llava(world, projector, trained):
    """In float64, with all weights moved off their initial values, at which most gradients are zero."""
    projector.double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    features = tower(world).double()(IMAGES.double()).requires_grad_(trained)
    tokens = projector(features)

    weights = {name: value.clone().requires_grad_() for name, value in projector.state_dict().items()}
    maps = by_hand.feature_maps(CLIPVisionModel.from_pretrained(world / "clip").double(), IMAGES.double())
    maps = [layer.requires_grad_(trained) for layer in maps]
    by_hands = by_hand.project(maps, weights)
    assert (by_hands - by_hand.project(maps, dict(weights, **{"fuser.cross_gate.scale": 0}))).abs().mean() > 0.1
    close = dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat(maps, -1), features, **close)
    torch.testing.assert_close(by_hands, tokens, **close)

    direction = torch.randn_like(tokens)
    tokens.backward(direction)
    by_hands.backward(direction)
    for name, parameter in projector.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(weights[name].grad, parameter.grad, **close)
    if trained:
        torch.testing.assert_close(torch.cat([layer.grad for layer in maps], -1), features.grad, **close)


def test_fresh_weights_are_those_of_a_fresh_projector(projector):
    """Those that are drawn for the fuser have the same range; all others are equal."""
    torch.manual_seed(0)  # as before the projector was made
    fresh, expected = by_hand.fresh_weights(WIDTH, TOKENS_WIDTH), projector.state_dict()
    assert set(fresh) == set(expected)
    for name, weight in fresh.items():
        assert weight.shape == expected[name].shape, name
        if name.endswith(("value_proj.weight", "output_proj.weight")):
            torch.testing.assert_close(weight.abs().max(), expected[name].abs().max(), rtol=0.01, atol=0)
        else:
            assert torch.equal(weight, expected[name]), name


def test_runs_without_the_package_and_starts_as_the_identity():
    code = "import runpy, sys; sys.modules['llava_mmfuser'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, host.ROOT / "scripts" / "by_hand.py"]
    lines = host.run(command, env=host.environment(LLAVA_MMFUSER_DISABLE="1")).stdout
    assert "starts as the identity: True\n" in lines and "tokens for the language model: [2, 16, 48]\n" in lines
    first, second, third = (line.split("first moves: ")[1] for line in lines.splitlines() if line.startswith("step"))
    assert first == "0.bias, 0.weight, 2.bias, 2.weight, fuser.cross_gate"
    assert second == "fuser.cross_attn, fuser.feat_norm, fuser.self_gate"
    assert third == "fuser.query_norm, fuser.self_attn, fuser.self_norm"
    assert "is the identity afterwards: False, tensors that never moved: 0\n" in lines
