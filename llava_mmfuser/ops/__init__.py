"""Deformable sampling: one definition (`reference`) and the faster formulations that match it."""

import os
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from . import embedding_bag, reference

VARIABLE = "LLAVA_MMFUSER_SAMPLING"


def _triton(*arguments: Any) -> torch.Tensor:
    from . import triton_kernels  # imports triton

    return triton_kernels.deformable_sampling(*arguments)


IMPLEMENTATIONS: Dict[str, Callable[..., torch.Tensor]] = {
    "reference": reference.deformable_sampling,
    "embedding_bag": embedding_bag.deformable_sampling,
    "triton": _triton,
}


def unavailable(implementation: str, device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Why an implementation cannot run for a value of this dtype on this device; None if it can.

    Raises:
        ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known; use {' or '.join(IMPLEMENTATIONS)}")
    device = torch.device(device)
    if implementation == "triton":
        from . import triton_kernels

        return triton_kernels.unavailable(device, dtype)
    if implementation == "embedding_bag" and device.type != "cpu":
        return f"embedding_bag is for the CPU, not for {device.type}"
    return None


def select_implementation(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What runs for a value of this dtype on this device: what the variable ``LLAVA_MMFUSER_SAMPLING`` names, else
    ``embedding_bag`` on the CPU and ``reference`` everywhere else.

    The Triton kernels have passed every test in Triton's interpreter, but have not run on a GPU yet; so they run only
    where they are asked for.

    Raises:
        ValueError: the variable names an implementation that does not exist or cannot run here.
    """
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        return "embedding_bag" if torch.device(device).type == "cpu" else "reference"
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen} is not known; use {' or '.join(IMPLEMENTATIONS)}, or unset it")
    reason = unavailable(chosen, device, dtype)
    if reason:
        raise ValueError(f"{VARIABLE}={chosen} cannot run here: {reason}; unset it")
    return chosen


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
        ValueError: unknown implementation, one that cannot run here, or shapes or devices that do not belong together.
    """
    if implementation is None:
        implementation = select_implementation(value.device, value.dtype)
    else:
        reason = unavailable(implementation, value.device, value.dtype)
        if reason:
            raise ValueError(f"implementation={implementation!r} cannot run here: {reason}")
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
    if not value.device == offsets.device == logits.device:
        raise ValueError(
            f"value, offsets and logits are on {value.device}, {offsets.device} and {logits.device}; "
            f"they must be on one device"
        )
    if implementation == "triton":  # reads any floating dtype and computes in float32
        return IMPLEMENTATIONS[implementation](value, offsets, logits, grid)
    dtype = torch.promote_types(value.dtype, torch.float32)
    out = IMPLEMENTATIONS[implementation](value.to(dtype), offsets.to(dtype), logits.to(dtype), grid)
    return out.to(value.dtype)
