"""Sparse attention: every query looks at its own neighbourhood in every level. Cost grows linearly with the tokens."""

from functools import reduce
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

from .dense import DenseAttention
from .leaves import LayerNorm, normed_linears


class WindowAttention(DenseAttention):
    """Multi-head scaled dot-product attention of query (row, column) to the k x k cells around (row, column), k odd.

    All levels share one softmax. Cells outside the map do not exist: a query in a corner has fewer of them. No
    positions are encoded, so that within its window a query tells cells apart by their content only.
    Computed in float32 for half types, projections aside. The weights are those of `DenseAttention`.

    Args:
        hidden_size: feature width C.
        num_levels: number of value maps L; any number runs through the same weights.
        num_heads: heads; must divide hidden_size.
        window_size: k.
    """

    def __init__(self, hidden_size: int, num_levels: int, num_heads: int, window_size: int):
        super().__init__(hidden_size, num_levels, num_heads)
        self.window_size = window_size

    def forward(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        grid: Tuple[int, int],
        query_norm: Optional[LayerNorm] = None,
        value_norm: Optional[LayerNorm] = None,
    ) -> torch.Tensor:
        """Attend from query [B, H*W, C] to value [B, L*H*W, C], levels in order, on a grid (H, W): [B, H*W, C]."""
        (query,) = normed_linears(query, query_norm, self.query_proj)
        key, value = normed_linears(value, value_norm, self.key_proj, self.value_proj)
        dtype = torch.promote_types(query.dtype, torch.float32)
        maps = [
            features.to(dtype).unflatten(1, (-1, *grid)).unflatten(-1, (self.num_heads, -1))  # [B, L, H, W, heads, D]
            for features in (query, key, value)
        ]
        # One shift of the maps after the other: all neighbourhoods at once would take k * k times the memory.
        logits = torch.stack([(maps[0] * neighbour).sum(-1) for neighbour in self._shifts(maps[1])], -1)
        inside = torch.stack(list(self._shifts(maps[1].new_ones(1, 1, *grid, 1, 1))), -1).squeeze(-2) > 0
        logits = logits.div(maps[0].shape[-1] ** 0.5).masked_fill(~inside, -float("inf"))  # [B, L, H, W, heads, k*k]
        weights = logits - logits.amax((1, -1), keepdim=True)
        weights = weights.exp()
        weights = weights / weights.sum((1, -1), keepdim=True)
        parts = zip(weights.unbind(-1), self._shifts(maps[2]))
        out = reduce(torch.add, ((weight.unsqueeze(-1) * neighbour).sum(1) for weight, neighbour in parts))
        return self.output_proj(out.flatten(1, 2).flatten(2).to(query.dtype))  # from [B, H, W, heads, D]

    def _shifts(self, maps: torch.Tensor) -> Iterator[torch.Tensor]:
        """Maps [B, L, H, W, heads, D] shifted to every cell of the window, row by row; zeros come from outside."""
        height, width = maps.shape[2:4]
        reach = self.window_size // 2
        padded = F.pad(maps, (0, 0, 0, 0, reach, reach, reach, reach))
        for row in range(self.window_size):
            for column in range(self.window_size):
                yield padded[:, :, row : row + height, column : column + width]
