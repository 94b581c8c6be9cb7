"""Leaf modules that know their own initial values.

LLaVA creates and loads models under conditions that defeat PyTorch's usual initialisation: `torch.nn.init` does nothing
inside `from_pretrained`, `disable_torch_init()` empties `Linear.reset_parameters` and `LayerNorm.reset_parameters`, and
parameters missing from a checkpoint are left as uninitialised memory. So every parameter of the fuser lives in a leaf
whose `reset_parameters` uses plain tensor operations; `llava_patch` calls it again for parameters a checkpoint lacked.

`Linear` is deliberately no `torch.nn.Linear`: rules that LLaVA, PEFT and bitsandbytes apply to every Linear of a model
(quantisation, LoRA targets, the LLM's weight initialisation) then pass the fuser by.
"""

import math
from typing import Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn

# Normalised features, and the scale and shift per channel that are still to be applied; see `LayerNorm`.
Normalized = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Features = Union[torch.Tensor, Normalized]


class Resettable:
    """Marks a module whose `reset_parameters` restores its own direct parameters, and only those."""

    def reset_parameters(self) -> None:
        raise NotImplementedError


class Linear(Resettable, nn.Module):
    """Affine map ``x W^T + b`` in the dtype of its input; Xavier-uniform weight, zero bias (paper, as Deformable DETR).

    Args:
        in_features: width of the input's last axis.
        out_features: width of the output's last axis.
        bias: False leaves it out.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Features) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features].

        The scale and shift of `Normalized` features go into the weight and the bias. Their gradients then come from
        those of the weight and bias, so that frozen features need none (for ViT-L 5.7 of the backward's 19 GFLOP).
        """
        weight, bias = self.weight, self.bias
        if isinstance(x, tuple):
            x, scale, shift = x
            dtype = torch.promote_types(weight.dtype, scale.dtype)
            shift = torch.mv(weight.to(dtype), shift.to(dtype))
            bias = shift if bias is None else bias + shift
            weight = weight * scale
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ZeroLinear(Linear):
    """Starts as zero: zero weight and bias."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()


class LayerNorm(Resettable, nn.LayerNorm):
    """`torch.nn.LayerNorm` whose weights may be wider than its input (float32 under bits 4/8) and that resets itself.

    The output has the input's dtype, except under autocast, which picks it. Where it is trained on frozen features, it
    leaves scale and shift to the `Linear` behind it and returns `Normalized`: copies of weight and bias, because they
    have to outlast this module's forward, after which ZeRO-3 takes the parameters away.
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1)
        self.bias.zero_()

    def forward(self, x: torch.Tensor) -> Features:
        trained = torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad
        if trained and not torch.jit.is_tracing():  # which compares its graph with one made without gradients
            return F.layer_norm(x, self.normalized_shape, eps=self.eps), self.weight.clone(), self.bias.clone()
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Gate(Resettable, nn.Module):
    """Learnable scale per channel, zero at first: ``residual + scale * x`` in the dtype of residual.

    The parameter is called ``scale`` because transformers 4.37 renames ``gamma`` and ``beta`` in every checkpoint key.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.zero_()

    def forward(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(residual, x.to(residual.dtype), self.scale.to(residual.dtype))


def materialize(module: nn.Module) -> None:
    """Give parameters of `Resettable`s below `module` that are on the meta device their initial values on the CPU."""
    for leaf in module.modules():
        if isinstance(leaf, Resettable) and any(parameter.is_meta for parameter in leaf.parameters(recurse=False)):
            loaded = {}
            for name, parameter in list(leaf.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = torch.empty_like(parameter, device="cpu")
                    setattr(leaf, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
                else:
                    loaded[name] = parameter.detach().clone()
            leaf.reset_parameters()
            with torch.no_grad():
                for name, value in loaded.items():
                    getattr(leaf, name).copy_(value)
