"""Deformable sampling as one `F.embedding_bag`: each head-slice of a feature vector is a row of a table, and a query's
output is the weighted sum of the rows at the four corners of each of its samples. Nothing is materialised per sample.
"""

from typing import Tuple

import torch
import torch.nn.functional as F

from .reference import cell_positions


def deformable_sampling(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> torch.Tensor:
    """See `llava_mmfuser.ops.deformable_sampling`; float32 or float64 only.

    Corners outside the map are read as border cells with weight 0, so an infinite value may spread NaN further than
    in the reference.
    """
    height, width = grid
    batch, queries, heads, levels, points, _ = offsets.shape
    if batch == 0:
        return value.new_zeros(0, queries, heads * value.shape[-1]) + 0 * (offsets.sum() + logits.sum())
    table = value.reshape(batch * levels * queries * heads, -1)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    row, column = cell_positions(grid, offsets)

    x_corners = _corners(column.view(-1, 1, 1, 1) + offsets[..., 0], width)
    y_corners = _corners(row.view(-1, 1, 1, 1) + offsets[..., 1], height)
    index = torch.empty(
        *logits.shape, 4, dtype=_index_dtype(max(table.shape[0], 4 * logits.numel())), device=value.device
    )
    first_row = _first_row_of_map(batch, levels, queries, heads, index)
    corner_weights = []
    for corner in range(4):
        x, x_weight = x_corners[corner % 2]
        y, y_weight = y_corners[corner // 2]
        index[..., corner] = first_row + (y * width + x).to(index.dtype) * heads
        corner_weights.append(weights * x_weight * y_weight)
    bags = batch * queries * heads
    out = F.embedding_bag(
        index.view(bags, -1), table, mode="sum", per_sample_weights=torch.stack(corner_weights, -1).view(bags, -1)
    )
    return out.view(batch, queries, -1)  # [B, N, heads*D]


def _corners(position: torch.Tensor, size: int):
    """Both neighbours of each position on one axis: ((index, weight), (index, weight)).

    Indices are always inside the map; a neighbour that is outside gets weight 0. Clamping to [-1, size] first changes
    nothing (all of it reads zero there) and keeps huge and infinite positions representable as integers.
    """
    position = position.clamp(-1, size)
    low = position.detach().floor().nan_to_num(0)
    upper_weight = position - low
    corners = []
    for index, weight in ((low, 1 - upper_weight), (low + 1, upper_weight)):
        inside = (index >= 0) & (index < size)
        corners.append((index.clamp(0, size - 1), weight * inside))
    return corners


def _index_dtype(largest: int) -> torch.dtype:
    return torch.int32 if largest <= torch.iinfo(torch.int32).max else torch.int64


def _first_row_of_map(batch: int, levels: int, queries: int, heads: int, like: torch.Tensor) -> torch.Tensor:
    """Table row of cell 0 for every image, head and level: [B, 1, heads, L, 1]."""
    image = torch.arange(batch, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(heads, dtype=like.dtype, device=like.device).view(1, 1, -1, 1, 1)
    level = torch.arange(levels, dtype=like.dtype, device=like.device).view(1, 1, 1, -1, 1)
    return (image * levels + level) * (queries * heads) + head
