"""An error for whoever differentiates hand-written gradients again."""

from typing import Any, Optional, Sequence, Tuple

import torch


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "this implementation of deformable sampling can be differentiated only once (once_differentiable); "
            "set LLAVA_MMFUSER_SAMPLING=reference for gradients of gradients"
        )


def once(
    inputs: Sequence[torch.Tensor], gradients: Sequence[Optional[torch.Tensor]]
) -> Tuple[Optional[torch.Tensor], ...]:
    """The gradients, computed without a graph from `inputs`, for which a second derivative raises.

    PyTorch's own `once_differentiable` does not know the inputs: `torch.autograd.grad` of chosen tensors passes its
    error by, and a part of the sum is missing.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return _Once.apply(len(inputs), *inputs, *gradients)
