"""The definition of deformable sampling, in readable PyTorch: `F.grid_sample` level by level."""

from typing import Tuple

import torch
import torch.nn.functional as F


def deformable_sampling(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> torch.Tensor:
    """See `sampling.deformable_sampling`; float32 or float64 only."""
    height, width = grid
    queries, heads, levels = offsets.shape[1:4]  # and not the batch: that of an exported graph is any
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    row, column = cell_positions(grid, offsets)
    size = torch.tensor([width, height], dtype=offsets.dtype, device=offsets.device)
    centre = (torch.stack([column, row], -1) + 0.5).view(1, queries, 1, 1, 1, 2)
    location = 2 * (centre + offsets) / size - 1  # [B, N, heads, L, P, 2], -1 … 1 from edge to edge
    maps = value.unflatten(1, (levels, height, width))
    out = value.new_zeros(())
    for level in range(levels):
        level_map = maps[:, level].permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B*heads, D, H, W]
        level_location = location[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B*heads, N, P, 2]
        sampled = F.grid_sample(level_map, level_location, mode="bilinear", padding_mode="zeros", align_corners=False)
        level_weights = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B*heads, N, P]
        out = out + (sampled * level_weights.unsqueeze(1)).sum(-1)  # [B*heads, D, N]
    return out.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)  # [B, N, heads*D]


def cell_positions(grid: Tuple[int, int], like: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every query of a row-major map, each [H*W], in the dtype and on the device of `like`."""
    index = torch.arange(grid[0] * grid[1], device=like.device)
    return torch.div(index, grid[1], rounding_mode="floor").to(like.dtype), (index % grid[1]).to(like.dtype)
