"""Deformable sampling in Triton, for CUDA (or for the CPU, in Triton's interpreter).

One launch forward; one backward, or two where deterministic algorithms are asked for. A program owns one image, one
head and a few neighbouring queries, which it takes in turn, all samples (levels and points) of a query at once.
Importing this file needs no triton; `unavailable` says whether anything in it can run. Written for triton >= 2.1.
"""

from __future__ import annotations

import os
import shutil
from typing import Dict, Optional, Sequence, Tuple

import torch

from .once import once
from .registration import is_compiling, operator

try:
    import triton
    import triton.language as tl
    from triton import jit

    _IMPORT_ERROR = None
except ImportError as error:
    triton, _IMPORT_ERROR = None, str(error)

    def jit(function):
        return function


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUERIES = 4  # per program: neighbours read the same cells, out of the L1 cache


def unavailable(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Why `deformable_sampling` cannot run for a value of this dtype on this device; None if it can."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype)[len('torch.') :]}"
    if triton is None:
        return f"the Triton kernels need triton, which cannot be imported: {_IMPORT_ERROR}"
    if not isinstance(_forward_kernel, triton.JITFunction):  # TRITON_INTERPRET=1
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
            return f"Triton's interpreter is right from triton 3.3 on, and this is {triton.__version__}"
        return None
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "the Triton kernels need a CUDA device, and PyTorch finds none"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need CUDA compute capability 8.0, and {device} has {'.'.join(map(str, capability))}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels: gcc, clang or whatever the variable CC names"
    return None


def deformable_sampling(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> torch.Tensor:
    """See `sampling.deformable_sampling`; a value of `DTYPES`, offsets and logits of any floating dtype.

    Computed in float32. A NaN offset reads zero, like every place outside the map. The gradient of value is summed
    with atomics, in another order every time, unless `torch.are_deterministic_algorithms_enabled()`: then every cell
    looks at every query, H*W * H*W * L * D multiply-adds per image and head (22 G for 16 images of LLaVA-1.5).
    Whether it can run at all is asked for with `unavailable`, once and not here.
    """
    value, offsets, logits = value.contiguous(), offsets.contiguous(), logits.contiguous()
    if is_compiling():
        return _OPERATOR(value, offsets, logits, *grid)
    return _DeformableSampling.apply(value, offsets, logits, grid)


class _DeformableSampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, offsets, logits, grid):
        ctx.save_for_backward(value, offsets, logits)
        ctx.grid = grid
        return _forward(value, offsets, logits, grid)

    @staticmethod
    def backward(ctx, grad_out):
        value, offsets, logits = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx.needs_input_grad, grad_out, value, offsets, logits, ctx.grid)
        return (*once((value, offsets, logits, grad_out), gradients), None)


def _forward(value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
    batch, queries, heads = offsets.shape[:3]
    out = torch.empty((batch, queries, heads * value.shape[3]), dtype=value.dtype, device=value.device)
    programs = batch * heads * triton.cdiv(queries, QUERIES)
    _launch(_forward_kernel, programs, (value, offsets, logits, out), **_sizes(value, offsets, grid))
    return out


def _gradients(
    needs: Sequence[bool],
    grad_out: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    grid: Tuple[int, int],
) -> Tuple[Optional[torch.Tensor], ...]:
    """Of value, offsets and logits; None where `needs`, in this order, has False."""
    needs_value, needs_offsets, needs_logits, *_ = needs
    atomics = needs_value and not torch.are_deterministic_algorithms_enabled()
    grad_value = grad_offsets = grad_logits = None
    if needs_value:
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    if needs_offsets:
        grad_offsets = torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)
    if needs_logits:
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    batch, queries, heads, levels = offsets.shape[:4]
    sizes = _sizes(value, offsets, grid)
    grad_out = grad_out.contiguous()
    if atomics or needs_offsets or needs_logits:
        tensors = (
            value,
            offsets,
            logits,
            grad_out,
            value if grad_value is None else grad_value,  # what is not needed is not written
            offsets if grad_offsets is None else grad_offsets,
            logits if grad_logits is None else grad_logits,
        )
        needed = {"NEEDS_VALUE": atomics, "NEEDS_OFFSETS": needs_offsets, "NEEDS_LOGITS": needs_logits}
        programs = batch * heads * triton.cdiv(queries, QUERIES)
        # Twice the tile of the forward in registers: more warps, or they are spilled and few fit.
        warps = max(1, min(8, sizes["BLOCK_S"] * sizes["BLOCK_D"] // 256))
        _launch(_backward_kernel, programs, tensors, **needed, **{**sizes, "num_warps": warps})
    if grad_value is not None and not atomics:
        block_c = max(16, min(64, 4096 // sizes["BLOCK_D"]))
        programs = batch * heads * levels * triton.cdiv(queries, block_c)
        sizes = {**sizes, "BLOCK_C": block_c, "BLOCK_Q": 16, "num_warps": 8}
        _launch(_grad_value_kernel, programs, (offsets, logits, grad_out, grad_value), **sizes)
    if grad_value is not None:
        grad_value = grad_value.to(value.dtype)
    return grad_value, grad_offsets, grad_logits


_OPERATOR = operator("triton", _forward, _gradients)


def _sizes(value: torch.Tensor, offsets: torch.Tensor, grid: Tuple[int, int]) -> Dict[str, int]:
    heads, levels, points = offsets.shape[2:5]
    block_s = triton.next_power_of_2(levels * points)
    block_d = max(16, triton.next_power_of_2(value.shape[3]))  # tl.dot wants 16
    return {
        "HEIGHT": grid[0],
        "WIDTH": grid[1],
        "HEADS": heads,
        "LEVELS": levels,
        "POINTS": points,
        "DEPTH": value.shape[3],
        "BLOCK_Q": QUERIES,
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
        "num_warps": max(1, min(8, block_s * block_d // 512)),
    }


def _launch(kernel, programs: int, tensors: Tuple[torch.Tensor, ...], **constants: int) -> None:
    """Run `programs` programs on the tensors' device (by itself, Triton takes the current one)."""
    if programs:
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](*tensors, **constants, num_stages=1)


@jit
def _forward_kernel(
    value,  # [B, L*N, heads, D]
    offsets,  # [B, N, heads, L, P, 2]
    logits,  # [B, N, heads, L, P]
    out,  # [B, N, heads, D]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head, first = _place(tl.program_id(0), HEIGHT * WIDTH, HEADS, BLOCK_Q)
    depth = tl.arange(0, BLOCK_D)
    for step in range(BLOCK_Q):
        query = first + step
        row = (image * (HEIGHT * WIDTH) + query) * HEADS + head  # of out, offsets and logits
        level, weight, x, x_part, y, y_part, is_sample = _samples(
            offsets, logits, row, query, HEIGHT, WIDTH, LEVELS, POINTS, BLOCK_S
        )
        is_depth = depth < _unless_past_the_end(DEPTH, query, HEIGHT * WIDTH)
        result = tl.full([BLOCK_S, BLOCK_D], 0, tl.float32)
        for corner in tl.static_range(4):
            cell, x_weight, y_weight, inside = _corner(x, y, x_part, y_part, corner % 2, corner // 2, HEIGHT, WIDTH)
            value_row = ((image * LEVELS + level) * (HEIGHT * WIDTH) + cell) * HEADS + head
            place = value_row[:, None] * DEPTH + depth[None, :]
            mask = (is_sample & inside)[:, None] & is_depth[None, :]
            feature = tl.load(value + place, mask=mask, other=0).to(tl.float32)
            result += (weight * x_weight * y_weight)[:, None] * feature
        result = tl.sum(result, 0).to(out.dtype.element_ty)
        tl.store(out + row * DEPTH + depth, result, mask=is_depth)


@jit
def _backward_kernel(
    value,  # [B, L*N, heads, D]
    offsets,  # [B, N, heads, L, P, 2]
    logits,  # [B, N, heads, L, P]
    grad_out,  # [B, N, heads, D]
    grad_value,  # as value, float32; added to
    grad_offsets,  # as offsets
    grad_logits,  # as logits
    NEEDS_VALUE: tl.constexpr,
    NEEDS_OFFSETS: tl.constexpr,
    NEEDS_LOGITS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, head, first = _place(tl.program_id(0), HEIGHT * WIDTH, HEADS, BLOCK_Q)
    depth = tl.arange(0, BLOCK_D)
    for step in range(BLOCK_Q):
        query = first + step
        row = (image * (HEIGHT * WIDTH) + query) * HEADS + head
        level, weight, x, x_part, y, y_part, is_sample = _samples(
            offsets, logits, row, query, HEIGHT, WIDTH, LEVELS, POINTS, BLOCK_S
        )
        is_depth = depth < _unless_past_the_end(DEPTH, query, HEIGHT * WIDTH)
        grad = tl.load(grad_out + row * DEPTH + depth, mask=is_depth, other=0).to(tl.float32)
        x_grad = tl.full([BLOCK_S], 0, tl.float32)
        y_grad = tl.full([BLOCK_S], 0, tl.float32)
        weight_grad = tl.full([BLOCK_S], 0, tl.float32)
        for corner in tl.static_range(4):
            cell, x_weight, y_weight, inside = _corner(x, y, x_part, y_part, corner % 2, corner // 2, HEIGHT, WIDTH)
            value_row = ((image * LEVELS + level) * (HEIGHT * WIDTH) + cell) * HEADS + head
            place = value_row[:, None] * DEPTH + depth[None, :]
            mask = (is_sample & inside)[:, None] & is_depth[None, :]
            if NEEDS_OFFSETS or NEEDS_LOGITS:
                feature = tl.load(value + place, mask=mask, other=0).to(tl.float32)
                match = tl.sum(feature * grad[None, :], 1)
                x_grad += (2 * (corner % 2) - 1) * y_weight * match
                y_grad += (2 * (corner // 2) - 1) * x_weight * match
                weight_grad += x_weight * y_weight * match
            if NEEDS_VALUE:
                share = (weight * x_weight * y_weight)[:, None] * grad[None, :]
                tl.atomic_add(grad_value + place, share, mask=mask, sem="relaxed")
        sample = row * (LEVELS * POINTS) + tl.arange(0, BLOCK_S)
        if NEEDS_OFFSETS:
            kind = grad_offsets.dtype.element_ty
            tl.store(grad_offsets + 2 * sample, (weight * x_grad).to(kind), mask=is_sample)
            tl.store(grad_offsets + 2 * sample + 1, (weight * y_grad).to(kind), mask=is_sample)
        if NEEDS_LOGITS:
            mean = tl.sum(weight * weight_grad, 0)
            tl.store(
                grad_logits + sample,
                (weight * (weight_grad - mean)).to(grad_logits.dtype.element_ty),
                mask=is_sample,
            )


@jit
def _grad_value_kernel(
    offsets,  # [B, N, heads, L, P, 2]
    logits,  # [B, N, heads, L, P]
    grad_out,  # [B, N, heads, D]
    grad_value,  # [B, L*N, heads, D]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Without atomics: a block of cells of one image, level and head collects from all queries.

    A sample's bilinear weight for a cell is the tent max(0, 1 - |dx|) * max(0, 1 - |dy|) of their distance, so that
    the gradient is a matrix product [cells, queries] x [queries, D].
    """
    level_index, head, first_cell = _place(tl.program_id(0), HEIGHT * WIDTH, HEADS, BLOCK_C)
    image = level_index // LEVELS
    level = level_index % LEVELS
    cell = first_cell + tl.arange(0, BLOCK_C)
    cell_x = (cell % WIDTH).to(tl.float32)
    cell_y = (cell // WIDTH).to(tl.float32)
    depth = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_S)
    is_column = column < LEVELS * POINTS
    result = tl.full([BLOCK_C, BLOCK_D], 0, tl.float32)
    for first_query in range(0, HEIGHT * WIDTH, BLOCK_Q):
        query = first_query + tl.arange(0, BLOCK_Q)
        is_query = query < HEIGHT * WIDTH
        row = (image * (HEIGHT * WIDTH) + query) * HEADS + head
        block = tl.load(
            logits + row[:, None] * (LEVELS * POINTS) + column[None, :],
            mask=is_query[:, None] & is_column[None, :],
            other=0,
        )
        block = tl.where(is_column[None, :], block.to(tl.float32), -float("inf"))
        largest = tl.max(block, 1)
        total = tl.sum(tl.exp(block - largest[:, None]), 1)
        tents = tl.full([BLOCK_C, BLOCK_Q], 0, tl.float32)
        for point in tl.static_range(POINTS):
            sample = row * (LEVELS * POINTS) + level * POINTS + point
            logit = tl.load(logits + sample, mask=is_query, other=0).to(tl.float32)
            weight = tl.where(is_query, tl.exp(logit - largest) / total, 0.0)
            x, y = _position(offsets, sample, query, is_query, WIDTH)
            tent = _tent(cell_x[:, None] - x[None, :]) * _tent(cell_y[:, None] - y[None, :])
            tents += tent * weight[None, :]
        grad = tl.load(
            grad_out + row[:, None] * DEPTH + depth[None, :],
            mask=is_query[:, None] & (depth < DEPTH)[None, :],
            other=0,
        )
        result += tl.dot(tents, grad.to(tl.float32), allow_tf32=False)
    value_row = (level_index * (HEIGHT * WIDTH) + cell) * HEADS + head
    tl.store(
        grad_value + value_row[:, None] * DEPTH + depth[None, :],
        result,
        mask=(cell < HEIGHT * WIDTH)[:, None] & (depth < DEPTH)[None, :],
    )


@jit
def _place(program, CELLS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Map, head and first cell of a program. The map is 64 bits wide, as its products with sizes may have to be."""
    blocks = (CELLS + BLOCK - 1) // BLOCK
    return (program // (blocks * HEADS)).to(tl.int64), program // blocks % HEADS, program % blocks * BLOCK


@jit
def _unless_past_the_end(SIZE: tl.constexpr, query, CELLS: tl.constexpr):
    """The size, or 0 in the last block's surplus. (Triton 3.9's interpreter fails on masks of scalar comparisons.)"""
    return tl.where(query < CELLS, SIZE, 0)


@jit
def _samples(
    offsets,
    logits,
    row,
    query,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of all samples [S] of one query: level, softmax weight, x and y split into cell and rest, whether it exists."""
    column = tl.arange(0, BLOCK_S)
    is_sample = column < _unless_past_the_end(LEVELS * POINTS, query, HEIGHT * WIDTH)
    sample = row * (LEVELS * POINTS) + column
    logit = tl.load(logits + sample, mask=is_sample, other=0).to(tl.float32)
    logit = tl.where(column < LEVELS * POINTS, logit, -float("inf"))
    weight = tl.exp(logit - tl.max(logit, 0))
    weight = weight / tl.sum(weight, 0)
    x, y = _position(offsets, sample, query, is_sample, WIDTH)
    x, x_part = _split(x, WIDTH)
    y, y_part = _split(y, HEIGHT)
    return column // POINTS, weight, x, x_part, y, y_part, is_sample


@jit
def _position(offsets, sample, query, mask, WIDTH: tl.constexpr):
    """(x, y) of samples in pixels."""
    x = tl.load(offsets + 2 * sample, mask=mask, other=0).to(tl.float32)
    y = tl.load(offsets + 2 * sample + 1, mask=mask, other=0).to(tl.float32)
    return query % WIDTH + x, query // WIDTH + y


@jit
def _split(position, SIZE: tl.constexpr):
    """Largest integer not above the position, and the distance to it.

    Positions further outside than -1 and SIZE, and NaN, first move to where both neighbours are outside.
    """
    position = tl.where(position >= -1, position, -2.0)
    position = tl.where(position < SIZE, position, SIZE * 1.0)
    low = position.to(tl.int32)
    low = tl.where(low > position, low - 1, low)
    return low, position - low


@jit
def _corner(x, y, x_part, y_part, RIGHT: tl.constexpr, BELOW: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """One of the four cells around each position: its index in the map, weights on both axes, whether it exists."""
    x = x + RIGHT
    y = y + BELOW
    inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
    x_weight = (1 - RIGHT) + (2 * RIGHT - 1) * x_part
    y_weight = (1 - BELOW) + (2 * BELOW - 1) * y_part
    return y * WIDTH + x, x_weight, y_weight, inside


@jit
def _tent(distance):
    height = 1 - tl.abs(distance)
    return tl.where(height > 0, height, 0.0)
