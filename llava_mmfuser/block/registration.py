"""Hand-written sampling as an operator of PyTorch, which torch.compile takes into its graphs as it is."""

import re
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

# torch 2.1 has it in another place, 2.0 nowhere.
_place = torch.compiler if hasattr(getattr(torch, "compiler", None), "is_compiling") else torch._utils
is_compiling = getattr(_place, "is_compiling", lambda: False)
# Before torch 2.7 nothing tells torch.compile from torch.export, whose graphs have to do without operators of ours.
SUPPORTED = hasattr(getattr(torch, "compiler", None), "is_exporting")
_TENSORS = "Tensor value, Tensor offsets, Tensor logits, int height, int width"


def operator(
    name: str,
    forward: Callable[..., torch.Tensor],
    gradients: Callable[..., Tuple[Optional[torch.Tensor], ...]],
) -> Any:
    """Register an implementation of deformable sampling; differentiable once.

    Args:
        name: of the operator, in a namespace of this copy of the package's own.
        forward: (value, offsets, logits, grid) to a new tensor [B, N, heads*D], contiguous.
        gradients: (needs, grad, value, offsets, logits, grid) to the gradient of each input, contiguous; None where
            its bool in `needs` is False.

    Returns:
        A function of (value, offsets, logits, height, width); None where PyTorch is too old (see `SUPPORTED`).
    """
    if not SUPPORTED:
        return None
    name = re.sub(r"\W", "_", __package__) + "::" + name

    def sample(value, offsets, logits, height, width):
        return forward(value, offsets, logits, (height, width))

    def sample_fake(value, offsets, logits, height, width):
        return value.new_empty(offsets.shape[0], offsets.shape[1], offsets.shape[2] * value.shape[3])

    def differentiate(needs, grad, value, offsets, logits, height, width) -> List[torch.Tensor]:
        found = gradients(needs, grad, value, offsets, logits, (height, width))
        return [gradient for gradient in found if gradient is not None]

    def differentiate_fake(needs, grad, *inputs) -> List[torch.Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, needs) if need]

    sampling = torch.library.custom_op(name, sample, mutates_args=(), schema=f"({_TENSORS}) -> Tensor")
    sampling.register_fake(sample_fake)
    schema = f"(bool[] needs, Tensor grad, {_TENSORS}) -> Tensor[]"
    backward = torch.library.custom_op(f"{name}_backward", differentiate, mutates_args=(), schema=schema)
    backward.register_fake(differentiate_fake)

    def keep(ctx: Any, inputs: Sequence[Any], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.grid = inputs[3:]

    def gradient(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        needs = list(ctx.needs_input_grad[:3])
        found = iter(backward(needs, grad, *ctx.saved_tensors, *ctx.grid))
        return (*(next(found) if need else None for need in needs), None, None)

    sampling.register_autograd(gradient, setup_context=keep)
    return sampling
