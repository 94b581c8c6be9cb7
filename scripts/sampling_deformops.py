"""Deformable sampling by the deformops package (MIT), a yardstick for `benchmark.py`: Triton on CUDA, else PyTorch."""

from importlib import import_module
from typing import Callable, Optional, Tuple

import torch

from llava_mmfuser.block.sampling_reference import cell_positions

_msda: Optional[Callable[..., torch.Tensor]] = None  # once `unavailable` found that it can run


def unavailable(dtype: torch.dtype) -> Optional[str]:
    """Why it cannot run here for a value of this dtype; None if it can."""
    global _msda
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"deformops takes float32, bfloat16 and float16, not {str(dtype)[len('torch.') :]}"
    if torch.are_deterministic_algorithms_enabled():
        return "deformops has no deterministic mode"
    try:
        _msda = import_module("deformops.registry").msda
    except ImportError as error:
        return f"deformops, for Python 3.12 and torch 2.11 or newer, cannot be imported: {error}"
    return None


def deformable_sampling(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> torch.Tensor:
    """See `sampling.deformable_sampling`."""
    assert _msda is not None
    height, width = grid
    queries, levels = offsets.shape[1], offsets.shape[3]
    row, column = cell_positions(grid, offsets.float())
    centre = (torch.stack([column, row], -1) + 0.5).view(1, queries, 1, 1, 1, 2)
    locations = (centre + offsets.float()) / torch.tensor([width, height], device=offsets.device)  # 0 … 1
    shapes = torch.tensor([grid] * levels, device=value.device)
    starts = queries * torch.arange(levels, device=value.device)
    weights = logits.to(value.dtype).flatten(3)
    return _msda(value, shapes, starts, locations.contiguous(), weights, method="softmax").to(value.dtype)
