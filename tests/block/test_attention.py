"""The attention kinds beside deformable: against plain loops, and under what LLaVA does with them."""

import paper
import pytest
import torch
from blocks import HALF_TOLERANCE, awake, close, maps

from llava_mmfuser import MMFuser
from llava_mmfuser.block.attention import build_attention
from llava_mmfuser.block.kinds import ATTENTION_KINDS

OTHERS = {"dense": dict(), "window": dict(window_size=3)}


@pytest.mark.parametrize(
    "kind,num_layers,batch,side,heads,self_attention,window_size,reach",
    [
        ("dense", 2, 1, 4, 4, True, 3, 99),
        ("dense", 4, 3, 3, 2, True, 3, 99),
        ("dense", 3, 2, 3, 1, False, 3, 99),
        ("dense", 3, 2, 1, 4, True, 3, 99),
        ("window", 2, 1, 4, 4, True, 3, 1),
        ("window", 4, 3, 5, 2, True, 3, 1),
        ("window", 3, 2, 4, 1, False, 1, 0),
        ("window", 3, 1, 4, 4, True, 5, 2),
        ("window", 3, 2, 2, 2, True, 7, 3),
        ("window", 3, 2, 1, 4, True, 3, 1),
    ],
)
def test_equals_a_loop_in_outputs_and_all_gradients(
    kind, num_layers, batch, side, heads, self_attention, window_size, reach
):
    settings = dict(attention=kind, self_attention=self_attention, window_size=window_size)
    fuser = awake(MMFuser(16, num_layers, heads, **settings).double())
    layers = maps(num_layers, batch, side)
    out = fuser(layers)
    parameters = dict(fuser.named_parameters())
    expected = paper.mmfuser(layers, parameters, heads, reach, self_attention, paper.neighbourhood_attention)
    assert close(out, expected, 1e-9)

    inputs = layers + list(fuser.parameters())
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for f, w in zip(found, wanted):
        # The key's bias moves all logits of a query alike: its gradient is rounding.
        assert (f - (torch.zeros_like(f) if w is None else w)).abs().max() <= 1e-9 * max(1, f.abs().max())

    assert close(fuser.float()([layer.float() for layer in layers]).double(), expected, 1e-5)


@pytest.mark.parametrize("dtype", list(HALF_TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.fp16_cpu
def test_half_types_stay_within_the_table(kind, dtype):
    fuser = awake(MMFuser(64, 5, 4, attention=kind), scale=0.1).to(dtype)
    layers = [layer.detach().to(dtype) for layer in maps(5, side=6, width=64)]
    out = fuser(layers)
    assert out.dtype == dtype
    expected = fuser.double()([layer.double() for layer in layers])
    assert close(out.double(), expected, HALF_TOLERANCE[dtype])


@pytest.mark.parametrize("kind", OTHERS)
def test_fresh_block_returns_the_query_layer_bit_for_bit(kind):
    layers = maps(5, side=5, width=64, dtype=torch.float32)
    assert torch.equal(MMFuser(64, 5, 16, attention=kind)(layers), layers[-1])


def test_window_that_covers_the_map_is_dense():
    window, dense = (MMFuser(16, 3, 4, attention=kind, window_size=7) for kind in ("window", "dense"))
    dense.load_state_dict(awake(window).state_dict())
    layers = maps(3, side=4, dtype=torch.float32)
    torch.testing.assert_close(window(layers), dense(layers))


def test_window_sees_its_neighbourhood_and_nothing_else():
    """Of a 5 x 5 map: the gradient of one query's output reaches exactly the 3 x 3 cells around it, in every level."""
    attention = build_attention("window", 16, 2, 4, window_size=3, num_points=4)
    query, value = torch.randn(1, 25, 16), torch.randn(1, 50, 16, requires_grad=True)
    for row, column in ((2, 2), (0, 4), (4, 1)):
        out = attention(query, value, (5, 5))[0, row * 5 + column]
        (grad,) = torch.autograd.grad(out.square().sum(), value)
        reached = grad.abs().sum(-1).view(2, 5, 5) > 0
        cells = torch.arange(5)
        near = ((cells - row).abs() <= 1).view(5, 1) & ((cells - column).abs() <= 1).view(1, 5)
        assert torch.equal(reached, near.expand(2, 5, 5))


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_kinds_run_on_oblong_grids_and_empty_batches(kind):
    attention = build_attention(kind, 16, 2, 4, window_size=3, num_points=4)
    assert attention(torch.randn(2, 6, 16), torch.randn(2, 12, 16), (2, 3)).shape == (2, 6, 16)
    assert attention(torch.randn(0, 6, 16), torch.randn(0, 12, 16), (2, 3)).shape == (0, 6, 16)


def test_even_windows_are_refused():
    with pytest.raises(ValueError, match="mm_fuser_window_size=2 is not allowed; .* such as 3"):
        MMFuser(16, 3, 4, attention="window", window_size=2)
