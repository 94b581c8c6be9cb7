"""Deformable sampling: one definition (``sampling_reference``) and the faster formulations that match it."""

import contextlib
import functools
import logging
import os
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch

from .registration import SUPPORTED, is_compiling
from .sampling_embedding_bag import deformable_sampling as embedding_bag
from .sampling_reference import cell_positions  # noqa: F401  (part of the definition)
from .sampling_reference import deformable_sampling as reference

logger = logging.getLogger("llava_mmfuser")
VARIABLE = "LLAVA_MMFUSER_SAMPLING"
# Largest deviation of two right implementations from each other, relative to the largest value: rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def _triton(*arguments: Any) -> torch.Tensor:
    from .sampling_triton import deformable_sampling  # imports triton

    return deformable_sampling(*arguments)


IMPLEMENTATIONS: Dict[str, Callable[..., torch.Tensor]] = {
    "reference": reference,
    "embedding_bag": embedding_bag,
    "triton": _triton,
}


def is_recorded() -> bool:
    """Whether PyTorch makes a graph of what runs, for elsewhere: torch.jit.trace, torch.onnx or torch.export; before
    torch 2.7 torch.compile, too."""
    return torch.jit.is_tracing() or (is_compiling() and not (SUPPORTED and not torch.compiler.is_exporting()))


def unavailable(implementation: str, device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Why an implementation cannot run for a value of this dtype on this device; None if it can.

    Raises:
        ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known; use {' or '.join(IMPLEMENTATIONS)}")
    device = torch.device(device)
    if implementation != "reference" and is_recorded():
        return "PyTorch makes a graph of what runs (jit.trace, onnx or export), which takes only reference"
    if implementation == "triton":
        from .sampling_triton import unavailable as triton_unavailable

        return triton_unavailable(device, dtype)
    if implementation == "embedding_bag" and device.type != "cpu":
        return f"embedding_bag is for the CPU, not for {device.type}"
    return None


def select_implementation(device: Union[str, torch.device], dtype: torch.dtype = torch.float32) -> str:
    """What runs for a value of this dtype on this device. Where a graph is being made (see `is_recorded`) that is
    ``reference``, whose operations every exporter knows; elsewhere what ``LLAVA_MMFUSER_SAMPLING`` names, else

    * on the CPU ``embedding_bag``;
    * on CUDA ``triton``, if it is available and agreed with the definition when it was tried on this very device (see
      `try_triton`); a disagreement is a warning;
    * everywhere else ``reference``.

    Decided once per device, dtype, value of the variable and deterministic mode; under torch.compile when it compiles.

    Raises:
        ValueError: the variable names an implementation that does not exist or cannot run here.
    """
    return "reference" if is_recorded() else _now(device, dtype)


def _now(device: Union[str, torch.device], dtype: torch.dtype) -> str:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return choose(os.environ.get(VARIABLE, ""), torch.device(device), dtype, deterministic)


# torch.compile calls it rather than look into it. (torch.compiler.assume_constant_result says it so, and imports 3 s of
# compiler.)
_now._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=None)
def choose(chosen: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
    """See `select_implementation`; `chosen` is the value of the variable, empty if it is not set."""
    if not chosen:
        if device.type == "cpu":
            return "embedding_bag"
        if device.type != "cuda" or unavailable("triton", device, dtype):
            return "reference"
        return "reference" if try_triton(device, dtype, deterministic) else "triton"
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE}={chosen} is not known; use {' or '.join(IMPLEMENTATIONS)}, or unset it")
    reason = unavailable(chosen, device, dtype)
    if reason:
        raise ValueError(f"{VARIABLE}={chosen} cannot run here: {reason}; unset it")
    return chosen


@functools.lru_cache(maxsize=None)
def try_triton(device: torch.device, dtype: torch.dtype, deterministic: bool) -> Optional[str]:
    """Run the Triton kernels once and compare output and gradients with the definition, which runs on the CPU.

    Kernels are compiled on the user's machine, by its compiler and for its GPU, which no test of ours has seen; this
    sees it, with the block sizes of LLaVA-1.5 on a small map, in the first call per process, device, dtype and mode. It
    leaves the random state alone.

    Returns:
        None if they agree; else what happened, which is logged as a warning, once.
    """
    batch, grid, heads, levels, points, depth = 2, (5, 7), 2, 4, 4, 64
    cells = grid[0] * grid[1]
    results = []
    try:
        # The caller may be anywhere: in inference mode, autocast, activation checkpointing or another default device.
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
            stack.enter_context(torch.device("cpu"))
            random = torch.Generator().manual_seed(0)
            value = torch.randn(batch, levels * cells, heads, depth, generator=random)
            # Off the integers, where the bilinear kernel has kinks and its gradient is either side's; some outside.
            offsets = torch.randint(-24, 24, (batch, cells, heads, levels, points, 2), generator=random) / 4 + 1 / 8
            logits = torch.randn(batch, cells, heads, levels, points, generator=random)
            cotangent = torch.randn(batch, cells, heads * depth, generator=random)
            rounded = [tensor.to(dtype) for tensor in (value, offsets, logits, cotangent)]
            for name, place, kind in (("triton", device, dtype), ("reference", "cpu", torch.float32)):
                *inputs, grad_out = (tensor.to(place, kind, copy=True) for tensor in rounded)
                inputs = [tensor.requires_grad_() for tensor in inputs]
                out = deformable_sampling(inputs[0], inputs[1], inputs[2], grid, implementation=name)
                gradients = torch.autograd.grad(out, inputs, grad_out)
                results.append([tensor.detach().cpu().double() for tensor in (out, *gradients)])
        problem = None
        for name, found, expected in zip(("output", "value's", "offsets'", "logits'"), *results):
            deviation = ((found - expected).abs().max() / expected.abs().max()).item()
            if not deviation <= TOLERANCE[dtype]:  # NaN is a deviation
                problem = f"{name} {'' if name == 'output' else 'gradient '}deviates by {deviation:.1e} of the largest"
                break
    except Exception as error:  # whatever the user's compiler and driver may raise
        problem = f"{type(error).__name__}: {error}"
    if problem:
        logger.warning(
            "the Triton kernels failed their check on %s (%s, deterministic=%s): %s; the sampling runs through "
            "F.grid_sample instead, which is slower and exact; please report this",
            device,
            dtype,
            deterministic,
            problem,
        )
    return problem


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
    if implementation == "triton":  # which reads half types and computes in float32
        return IMPLEMENTATIONS[implementation](value, offsets, logits, grid)
    dtype = torch.promote_types(value.dtype, torch.float32)
    out = IMPLEMENTATIONS[implementation](value.to(dtype), offsets.to(dtype), logits.to(dtype), grid)
    return out.to(value.dtype)
