"""Deformable sampling as one `F.embedding_bag`: each head-slice of a feature vector is a row of a table, and a query's
output is the weighted sum of the rows at the four corners of each of its samples. Nothing is materialised per sample.

The backward is written out: the gradient of the table is a bag over the transposed (sorted) indices, that of a weight a
dot product per corner (`torch.sparse.sampled_addmm`). Both add up in a fixed order.
"""

import warnings
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .once import once
from .registration import is_compiling, operator
from .sampling_reference import cell_positions


def deformable_sampling(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> torch.Tensor:
    """See `sampling.deformable_sampling`; float32 or float64 only, differentiable once.

    Corners outside the map are read as border cells with weight 0, so an infinite value may spread NaN further than
    in the reference.
    """
    if is_compiling():
        return _OPERATOR(value, offsets, logits, *grid)
    # Stands for the inputs in the graph of a second derivative; they themselves need not be kept.
    inputs = value[:0].sum() + offsets[:0].sum() + logits[:0].sum()
    return _Sampling.apply(value, offsets, logits, grid, inputs)


class _Sampling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        grid: Tuple[int, int],
        inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.shapes = value.shape, offsets.shape
        bags = _bags(value, offsets, logits, grid)
        ctx.save_for_backward(inputs, *bags)
        return _sum(value, offsets, bags)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        inputs, *bags = ctx.saved_tensors  # asked for once: activation checkpointing hands them out once
        with torch.no_grad():
            gradients = _gradients(ctx.needs_input_grad, grad, ctx.shapes[0], ctx.shapes[1], bags)
        return (*once((inputs, grad), gradients), None, None)


def _bags(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, grid: Tuple[int, int]
) -> Sequence[torch.Tensor]:
    """The table, which of its rows each bag holds and with which weights, and what the gradients need besides."""
    batch, queries, heads, levels, points, _ = offsets.shape
    if batch == 0:
        return ()
    table = value.reshape(batch * levels * queries * heads, -1)
    attention = logits.flatten(3).softmax(-1).view_as(logits)
    row, column = (place.view(-1, 1, 1, 1) for place in cell_positions(grid, offsets))
    x_cells, x_weights, x_inside = _ends(offsets[..., 0] + column, grid[1])
    y_cells, y_weights, y_inside = _ends(offsets[..., 1] + row, grid[0])
    # Axis by axis and corner by corner: trailing axes of length 2 would make every operation several times slower.
    dtype = _index_dtype(max(table.shape[0], 4 * logits.numel()))
    index = torch.empty(*logits.shape, 4, dtype=dtype, device=value.device)
    corners = torch.empty(*logits.shape, 4, dtype=value.dtype, device=value.device)
    first_row = _first_row_of_map(batch, levels, queries, heads, index)
    columns = [cells.to(dtype) for cells in x_cells]
    for below in range(2):
        rows = y_cells[below].to(dtype).mul_(grid[1])
        row_weights = attention * y_weights[below]
        for right in range(2):
            torch.add(first_row, rows + columns[right], alpha=heads, out=index[..., 2 * below + right])
            torch.mul(row_weights, x_weights[right], out=corners[..., 2 * below + right])
    bags = batch * queries * heads
    index, corners = index.view(bags, -1), corners.view(bags, -1)
    return table, index, corners, attention, *x_weights, *y_weights, *x_inside, *y_inside


def _sum(value: torch.Tensor, offsets: torch.Tensor, bags: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, N, heads*D]."""
    batch, queries, heads = offsets.shape[:3]
    if not bags:
        return value.new_zeros(batch, queries, heads * value.shape[-1])
    table, index, corners, *_ = bags
    out = F.embedding_bag(index, table, mode="sum", per_sample_weights=corners)
    return out.view(batch, queries, -1)


def _gradients(
    needs: Sequence[bool],
    grad: torch.Tensor,
    value_shape: torch.Size,
    offsets_shape: torch.Size,
    bags: Sequence[torch.Tensor],
) -> Tuple[Optional[torch.Tensor], ...]:
    """Of value, offsets and logits; None where `needs`, in this order, has False."""
    if not bags:  # an empty batch
        return grad.new_zeros(value_shape), grad.new_zeros(offsets_shape), grad.new_zeros(offsets_shape[:-1])
    table, index, corners, attention, left, right, top, bottom, *inside = bags  # weights of the ends
    grad = grad.reshape(index.shape[0], -1)
    grad_value = grad_offsets = grad_logits = None
    if needs[0]:
        grad_value = _transposed_bag(index, corners, grad, table.shape[0]).view(value_shape)
    if needs[1] or needs[2]:
        dots = _dots(index, grad, table).view(*attention.shape, 4)
        top_left, top_right, bottom_left, bottom_right = (dot.contiguous() for dot in dots.unbind(-1))
        above = (left * top_left).addcmul_(right, top_right)
        below = (left * bottom_left).addcmul_(right, bottom_right)
        grad_logits = (top * above).addcmul_(bottom, below).mul_(attention)
        left_inside, right_inside, top_inside, bottom_inside = inside
        grad_offsets = torch.empty(offsets_shape, dtype=grad.dtype, device=grad.device)
        grad_offsets[..., 1] = below.mul_(bottom_inside).sub_(above.mul_(top_inside)).mul_(attention)
        on_left = (top * top_left).addcmul_(bottom, bottom_left).mul_(left_inside)
        on_right = (top * top_right).addcmul_(bottom, bottom_right).mul_(right_inside)
        grad_offsets[..., 0] = on_right.sub_(on_left).mul_(attention)
        grad_logits = grad_logits - attention * grad_logits.sum((-2, -1), keepdim=True)
    return grad_value, grad_offsets, grad_logits


Ends = Tuple[torch.Tensor, torch.Tensor]


def _ends(position: torch.Tensor, size: int) -> Tuple[Ends, Ends, Ends]:
    """Both neighbours of each position on one axis: (low, high) cells, which are always inside the map, their weights,
    0 outside, and whether they are inside. Overwrites `position`.

    Clamping to [-2, size] changes nothing (all beyond -1 and size reads zero) and keeps huge and infinite positions
    representable as integers.
    """
    position = position.clamp_(-2, size).nan_to_num_(nan=-2)
    low = position.floor()
    high_weight = position.sub_(low)
    low_inside, high_inside = (low >= 0).logical_and_(low < size), (low >= -1).logical_and_(low < size - 1)
    low_weight = (1 - high_weight).mul_(low_inside)
    high_weight.mul_(high_inside)
    high = (low + 1).clamp_(0, size - 1)
    return (low.clamp_(0, size - 1), high), (low_weight, high_weight), (low_inside, high_inside)


def _transposed_bag(index: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Row r of the result is the sum of ``weights[b, k] * grad[b]`` over all (b, k) with ``index[b, k] == r``."""
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    offsets = torch.zeros(num_rows + 1, dtype=index.dtype, device=index.device)
    torch.cumsum(torch.bincount(flat, minlength=num_rows), 0, out=offsets[1:])
    bags = torch.div(order, index.shape[1], rounding_mode="floor").to(index.dtype)
    return F.embedding_bag(
        bags,
        grad,
        offsets,
        mode="sum",
        per_sample_weights=weights.flatten().index_select(0, order),
        include_last_offset=True,
    )


def _dots(index: torch.Tensor, grad: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``grad[b] . table[index[b, k]]`` for all (b, k), flat."""
    bags, per_bag = index.shape
    if per_bag > table.shape[0]:  # more than a sparse matrix may hold; such a map is tiny
        return (table[index.long()] * grad.unsqueeze(1)).sum(-1).flatten()
    starts = torch.arange(0, bags * per_bag + 1, per_bag, dtype=index.dtype, device=index.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")  # not the user's business
        zeros = torch.zeros(bags * per_bag, dtype=grad.dtype, device=grad.device)
        shape = (bags, table.shape[0])
        pattern = torch.sparse_csr_tensor(starts, index.flatten(), zeros, size=shape, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, grad, table.t(), beta=0.0).values()


def _index_dtype(largest: int) -> torch.dtype:
    return torch.int32 if largest <= torch.iinfo(torch.int32).max else torch.int64


def _first_row_of_map(batch: int, levels: int, queries: int, heads: int, like: torch.Tensor) -> torch.Tensor:
    """Table row of cell 0 for every image, head and level: [B, 1, heads, L, 1]."""
    image = torch.arange(batch, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(heads, dtype=like.dtype, device=like.device).view(1, 1, -1, 1, 1)
    level = torch.arange(levels, dtype=like.dtype, device=like.device).view(1, 1, 1, -1, 1)
    return (image * levels + level) * (queries * heads) + head


_OPERATOR = operator(
    "embedding_bag",
    lambda value, offsets, logits, grid: _sum(value, offsets, _bags(value, offsets, logits, grid)),
    lambda needs, grad, value, offsets, logits, grid: _gradients(
        needs, grad, value.shape, offsets.shape, _bags(value, offsets, logits, grid)
    ),
)
