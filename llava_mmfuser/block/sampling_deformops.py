"""Deformable sampling by the deformops package (MIT), where it is installed: Triton on CUDA, PyTorch elsewhere.

Nothing chooses it by itself: it is a yardstick, which no GPU of ours has compared with our own kernels yet.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Optional, Tuple

import torch

from .sampling_reference import cell_positions


def unavailable() -> Optional[str]:
    """Why it cannot run here; None if it can."""
    if find_spec("deformops") is None:
        return "the deformops package is not installed; pip install deformops (Python 3.12 and torch 2.11 or newer)"
    if torch.are_deterministic_algorithms_enabled():
        return "deformops has no deterministic mode"
    return None


def deformable_sampling(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> torch.Tensor:
    """See `sampling.deformable_sampling`."""
    # Not an import statement: transformers would ask users of an exported folder, which holds this file, to install it.
    msda = import_module("deformops.registry").msda
    height, width = grid
    queries, levels = offsets.shape[1], offsets.shape[3]
    row, column = cell_positions(grid, offsets.float())
    centre = (torch.stack([column, row], -1) + 0.5).view(1, queries, 1, 1, 1, 2)
    locations = (centre + offsets.float()) / torch.tensor([width, height], device=offsets.device)  # 0 … 1
    shapes = torch.tensor([grid] * levels, device=value.device)
    starts = queries * torch.arange(levels, device=value.device)
    weights = logits.to(value.dtype).flatten(3)
    return msda(value, shapes, starts, locations.contiguous(), weights, method="softmax").to(value.dtype)
