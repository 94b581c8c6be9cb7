"""Multi-scale deformable attention (arXiv 2010.04159), all levels on the query's own grid."""

import math
from typing import Optional, Tuple

import torch
from torch import nn

from .leaves import LayerNorm, Linear, ZeroLinear, normed_linears
from .sampling import cell_positions, deformable_sampling

NEAR = 0.125  # of a cell: not 0, for points at the same place would stay together


class _OffsetLinear(Linear):
    """Zero weight; the bias points each head in its own direction, point k at distance k+1 (Deformable DETR's ring).

    `near` shrinks the ring to `NEAR` of that, around the middle of the query's own cell.
    """

    bias: nn.Parameter

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, num_points: int, near: bool):
        self.shape = (num_heads, num_levels, num_points, 2)
        self.unit = NEAR if near else 1.0
        super().__init__(hidden_size, math.prod(self.shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        num_heads, _, num_points, _ = self.shape
        angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, num_points + 1, dtype=torch.float32) * self.unit
        ring = direction.view(-1, 1, 1, 2) * distance.view(1, 1, -1, 1)
        self.weight.zero_()
        self.bias.copy_(ring.expand(self.shape).reshape(-1))


class DeformableAttention(nn.Module):
    """Each query samples a few learned places around its own cell in every level.

    Args:
        hidden_size: feature width C.
        num_levels: number of value maps L.
        num_heads: heads; must divide hidden_size.
        num_points: samples per head and level.
        near: whether it starts at the query's own cell.

    Parameter names and the row order of `sampling_offsets` (head, level, point, xy) and `attention_weights`
    (head, level, point) are Deformable DETR's and the authors'.
    """

    def __init__(self, hidden_size: int, num_levels: int, num_heads: int, num_points: int, near: bool = False):
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        self.sampling_offsets = _OffsetLinear(hidden_size, num_heads, num_levels, num_points, near)
        self.attention_weights = ZeroLinear(hidden_size, math.prod(self.shape))
        self.value_proj = Linear(hidden_size, hidden_size)
        self.output_proj = Linear(hidden_size, hidden_size)

    def forward(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        grid: Tuple[int, int],
        query_norm: Optional[LayerNorm] = None,
        value_norm: Optional[LayerNorm] = None,
    ) -> torch.Tensor:
        """Attend from query [B, H*W, C] to value [B, L*H*W, C], levels in order, on a grid (H, W): [B, H*W, C]."""
        (value,) = normed_linears(value, value_norm, self.value_proj)
        offsets, logits = self._places(query, query_norm)
        value = value.unflatten(-1, (self.shape[0], -1))
        return self.output_proj(deformable_sampling(value, offsets, logits, grid))

    def samples(self, query: torch.Tensor, grid: Tuple[int, int]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Where normalised queries [B, H*W, C] look, and with which weights; see `fusion.Fusion.samples`."""
        offsets, logits = self._places(query, None)
        row, column = cell_positions(grid, offsets)
        places = offsets + torch.stack([column, row], -1).view(1, -1, 1, 1, 1, 2)
        return places, logits.flatten(3).softmax(-1).view_as(logits)

    def _places(self, query: torch.Tensor, norm: Optional[LayerNorm]) -> Tuple[torch.Tensor, torch.Tensor]:
        offsets, logits = normed_linears(query, norm, self.sampling_offsets, self.attention_weights)
        return offsets.unflatten(-1, (*self.shape, 2)), logits.unflatten(-1, self.shape)
