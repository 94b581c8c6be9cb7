"""Deformable sampling: one definition (`reference`) and the faster formulations that match it."""

from typing import Optional, Tuple

import torch

from .embedding_bag import deformable_sampling as _embedding_bag
from .reference import deformable_sampling as _reference

IMPLEMENTATIONS = {"reference": _reference, "embedding_bag": _embedding_bag}


def select_implementation(device: torch.device) -> str:
    """The implementation that runs on a device: ``embedding_bag`` on the CPU, ``reference`` everywhere else."""
    return "embedding_bag" if torch.device(device).type == "cpu" else "reference"


def deformable_sampling(
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    grid: Tuple[int, int],
    implementation: Optional[str] = None,
) -> torch.Tensor:
    """Weighted bilinear samples around each query's own cell (Deformable DETR, arXiv 2010.04159, eq. 3).

    Query (row, column) reads level l at pixel ``(column + offset_x, row + offset_y)``, for every head and point, with
    bilinear interpolation and zeros outside the map, and sums over levels and points with softmax weights. That is
    `grid_sample` with ``align_corners=False`` and the centre of the query's cell as reference point.
    Computed in float32 for half types (softmax included), in the input's own dtype otherwise.

    Args:
        value: projected features [B, L*H*W, heads, D], levels shallow first, each row-major.
        offsets: in pixels, (x, y) last [B, H*W, heads, L, P, 2].
        logits: attention weights before the softmax over levels and points [B, H*W, heads, L, P].
        grid: (H, W), rows and columns of the query map and of every level.
        implementation: a key of `IMPLEMENTATIONS`; None picks by `select_implementation`.

    Returns:
        [B, H*W, heads * D] in the dtype of value.

    Raises:
        ValueError: unknown implementation, or shapes that do not belong together.
    """
    if implementation is None:
        implementation = select_implementation(value.device)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known; use {' or '.join(IMPLEMENTATIONS)}")
    queries = grid[0] * grid[1]
    if value.dim() != 4 or offsets.dim() != 6 or offsets.shape[-1] != 2 or logits.shape != offsets.shape[:-1]:
        raise ValueError(
            f"value {tuple(value.shape)}, offsets {tuple(offsets.shape)} and logits {tuple(logits.shape)} "
            f"must be [B, L*N, heads, D], [B, N, heads, L, P, 2] and [B, N, heads, L, P]"
        )
    batch, _, heads, levels, _, _ = offsets.shape
    if offsets.shape[1] != queries or tuple(value.shape[:3]) != (batch, levels * queries, heads):
        raise ValueError(
            f"grid={grid} has {queries} cells, which does not fit value {tuple(value.shape)} "
            f"and offsets {tuple(offsets.shape)}"
        )
    dtype = torch.promote_types(value.dtype, torch.float32)
    out = IMPLEMENTATIONS[implementation](value.to(dtype), offsets.to(dtype), logits.to(dtype), grid)
    return out.to(value.dtype)
