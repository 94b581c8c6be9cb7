"""Leaf modules that know their own initial values.

LLaVA creates and loads models under conditions that defeat PyTorch's usual initialisation: `torch.nn.init` does nothing
inside `from_pretrained`, `disable_torch_init()` empties `Linear.reset_parameters` and `LayerNorm.reset_parameters`, and
parameters missing from a checkpoint are left as uninitialised memory. So every parameter of the fuser lives in a leaf
whose `reset_parameters` uses plain tensor operations; the host calls it again for parameters that a checkpoint lacked.

`Linear` is deliberately no `torch.nn.Linear`: rules that LLaVA, PEFT and bitsandbytes apply to every Linear of a model
(quantisation, LoRA targets, the LLM's weight initialisation) then pass the fuser by.
"""

import contextlib
import math
from typing import TYPE_CHECKING, Container, Iterator, List, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn

# No module at run time: DeepSpeed's ``zero.Init`` would give it an `__init__`, which hides that of a second base.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class Resettable(_Mixin):
    """Marks a module whose `reset_parameters` restores its own direct parameters, and only those."""

    decays = True  # whether an optimizer's weight decay is for its parameters other than a bias

    def reset_parameters(self) -> None:
        raise NotImplementedError


class Normalized(NamedTuple):
    """What `LayerNorm` leaves to the `Linear` behind it: normalised features, scale and shift still to be applied."""

    features: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


class Linear(Resettable, nn.Module):
    """Affine map ``x W^T + b`` in the dtype of its input; Xavier-uniform weight, zero bias (paper, as Deformable DETR).

    Args:
        in_features: width of the input's last axis.
        out_features: width of the output's last axis.
        bias: False leaves it out.
    """

    bias: Optional[nn.Parameter]

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        if not self.weight.is_meta:  # drawn on the CPU in float32: the same numbers on every device and in every dtype
            values = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu")
            self.weight.copy_(values.uniform_(-bound, bound))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Union[torch.Tensor, Normalized]) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]; see `normed_linears` about `Normalized` features."""
        weight: torch.Tensor = self.weight
        bias: Optional[torch.Tensor] = self.bias
        if isinstance(x, Normalized):
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

    The output has the input's dtype, except under autocast, which picks it.
    """

    decays = False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1)
        self.bias.zero_()

    # `apart` is no method of its own, because ZeRO-3 has the parameters gathered in a forward only.
    def forward(self, x: torch.Tensor, apart: bool = False) -> Union[torch.Tensor, Normalized]:  # type: ignore[override]
        """Normalise [..., C]; `apart` leaves scale and shift to `normed_linears`."""
        if apart:  # copies, which outlast this module's forward, after which ZeRO-3 takes the parameters away
            features = F.layer_norm(x, self.normalized_shape, eps=self.eps)
            return Normalized(features, self.weight.clone(), self.bias.clone())
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def normed_linears(x: torch.Tensor, norm: Optional[LayerNorm], *linears: Linear) -> List[torch.Tensor]:
    """``[linear(norm(x)) for linear in linears]``, with the norm's scale and shift folded into the linears in training.

    Where the norm is trained on features that are not, its gradients then come from those of weight and bias, and the
    features need none: for ViT-L 5.7 GFLOP of the backward's 19.

    Args:
        x: [..., C].
        norm: None where `x` is normalised already.
        linears: what reads it.
    """
    if norm is None:
        normed = x
    else:
        trained = torch.is_grad_enabled() and norm.weight.requires_grad and not x.requires_grad
        # A trace compares its graph with one that is made without gradients.
        normed = norm(x, apart=trained and not torch.jit.is_tracing())
    return [linear(normed) for linear in linears]


class Gate(Resettable, nn.Module):
    """Learnable scale per channel: ``residual + scale * x`` in the dtype of residual.

    Args:
        hidden_size: number of channels.
        start: initial value; at 0 the residual passes unchanged.

    The parameter is called ``scale`` because transformers 4.37 renames ``gamma`` and ``beta`` in every checkpoint key.
    """

    decays = False

    def __init__(self, hidden_size: int, start: float = 0.0):
        super().__init__()
        self.start = start
        self.scale = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.fill_(self.start)

    def forward(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(residual, x.to(residual.dtype), self.scale.to(residual.dtype))


@contextlib.contextmanager
def own_random_state(seed: Optional[int] = None) -> Iterator[None]:
    """Within this context random numbers on the CPU have a seed of their own; afterwards they go on as before it.

    Args:
        seed: None takes one that depends on where torch's generator stands, and so on `torch.manual_seed`.
    """
    with torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        torch.default_generator.manual_seed(seed)  # unlike `torch.manual_seed` it leaves other devices alone
        yield


@torch.no_grad()
def reset(module: nn.Module, names: Container[str]) -> None:
    """Give these parameters of `Resettable`s below `module` their initial values; all others keep theirs."""
    for path, leaf in module.named_modules():
        if isinstance(leaf, Resettable):
            own = dict(leaf.named_parameters(recurse=False))
            kept = {name: own[name].clone() for name in own if f"{path}.{name}".lstrip(".") not in names}
            if len(kept) < len(own):
                leaf.reset_parameters()
                for name, value in kept.items():
                    own[name].copy_(value)


def materialize(module: nn.Module) -> None:
    """Give parameters of `Resettable`s below `module` that are on the meta device their initial values on the CPU."""
    names = set()
    for path, leaf in module.named_modules():
        if isinstance(leaf, Resettable):
            for name, parameter in list(leaf.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = torch.empty_like(parameter, device="cpu")
                    setattr(leaf, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
                    names.add(f"{path}.{name}".lstrip("."))
    reset(module, names)
