"""MMFuserProjector: the fuser in front of LLaVA's projector, whose parameters keep their names."""

import logging
import math
from collections import OrderedDict
from typing import Callable, Dict, Iterator, List, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn

from .block.fusion import Fusion
from .block.leaves import Resettable, own_random_state
from .config import MMFuserConfig
from .names import MARK, Shapes, compare, rename_published, without_wrapper

logger = logging.getLogger("llava_mmfuser")


class MMFuserProjector(Resettable, nn.Module):
    """``projector(fuser(layers))``, drop-in for LLaVA's ``mm_projector``.

    The projector's children and parameters become ours under the same names: ``0`` and ``2`` of an MLP, ``weight`` and
    ``bias`` of ``linear``. So released checkpoints and adapters load by name. The objects are moved, not copied: dtype,
    device, quantisation and ZeRO partitioning stay. The block is called ``fuser``.

    Other code can read this as LLaVA's projector: items, length and iteration of an MLP
    (``projector[0].weight.dtype``), or ``weight``, ``bias``, ``in_features`` and ``out_features`` of ``linear``. These
    leave out the fuser, so in_features is C. This is no `nn.Sequential`: running its items would skip the fuser.

    Args:
        fuser: `MMFuser` or one of its rivals.
        projector: built by LLaVA's `build_vision_projector` for ``linear`` or ``mlpNx_gelu``.
    """

    weight: nn.Parameter  # ``linear`` alone has weight and bias
    bias: nn.Parameter

    def __init__(self, fuser: Fusion, projector: nn.Module):
        super().__init__()
        for name, child in projector.named_children():
            self.add_module(name, child)
        for name, parameter in projector.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if isinstance(projector, nn.Linear):
            self.in_features, self.out_features = projector.in_features, projector.out_features
        self.fuser = fuser
        self.num_loaded: Optional[int] = None  # number of fuser tensors in the last state dict for this projector
        self.missing: List[str] = []  # fuser tensors that the loaded checkpoint lacked
        self.lr: Optional[float] = None  # the fuser's learning rate; None means the projector's
        self.gate_lr: Union[None, float, str] = None  # that of what opens it; see `hooks.optimizer`
        self.log_gates = True  # whether the Trainer logs the fuser's gates
        self._in_model = False  # whether the last state dict was a whole model's
        self._problems: Optional[str] = None  # missing and unexpected tensors of the last state dict
        self.register_load_state_dict_post_hook(self._after_load_state_dict)

    @classmethod
    def build(cls, settings: MMFuserConfig, hidden_size: int, projector: nn.Module) -> "MMFuserProjector":
        """Put a fresh fuser for feature maps of width hidden_size in front of a projector.

        Later random numbers are the same as without the fuser.
        """
        first = next(module for module in projector.modules() if isinstance(module, nn.Linear))
        with own_random_state():
            fuser = settings.build(hidden_size, first.out_features)
        return cls(fuser, projector)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Fuse and project the output of the patched vision tower.

        Args:
            features: [B, N, L*C], or [B, 1+N, L*C] with CLS first (``cls_patch``); N is a square. The query layer's CLS
                passes the fuser unchanged.

        Returns:
            [B, N, D] or [B, 1+N, D]; D is the width of the language model. `block.rivals.TokenConcat` returns L*N
            tokens for N.

        Raises:
            ValueError: the channel count is not L*C, or the token count is neither a square nor a square plus one.
        """
        adopted: List[Callable[[torch.Tensor], torch.Tensor]] = [*self._adopted().values()]
        first, *others = adopted or [lambda x: F.linear(x, self.weight, self.bias)]
        fused = self.fuser.project(features, first)
        for child in others:
            fused = child(fused)
        return fused

    def _adopted(self) -> Dict[str, nn.Module]:
        return {name: child for name, child in self.named_children() if name != "fuser"}

    def _items(self) -> nn.Sequential:
        children = OrderedDict(self._adopted())
        if not children:
            raise TypeError("this projector is linear, so it has no items, as torch.nn.Linear has none")
        return nn.Sequential(children)

    def __getitem__(self, index: Union[int, slice]) -> nn.Module:
        return self._items()[index]

    def __len__(self) -> int:
        return len(self._items())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._items())

    def __bool__(self) -> bool:  # else truth would ask for a length, which linear lacks
        return True

    def shapes(self) -> Shapes:
        """Names and whole shapes of all parameters, even if ZeRO-3 has partitioned them."""
        return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in self.named_parameters()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if "weight" in self._parameters:  # as torch.nn.Linear
            bound = 1 / math.sqrt(self.weight.shape[1])
            self.weight.uniform_(-bound, bound)
            self.bias.uniform_(-bound, bound)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        without_wrapper(state_dict, prefix)
        rename_published(state_dict, prefix, linear="weight" in self._parameters)
        shapes = {key[len(prefix) :]: tuple(value.shape) for key, value in state_dict.items() if key.startswith(prefix)}
        fuser = {"fuser." + name for name, _ in self.fuser.named_parameters()}
        self.num_loaded = len(fuser & shapes.keys()) if shapes and fuser else None
        self._in_model = prefix != ""  # code that loads the projector alone reports it itself
        # A shard of a whole model may hold any part of the projector; an adapter must hold all of it.
        whole = prefix == "" or (shapes and all(MARK in key for key in state_dict))
        whole = whole and not any(hasattr(value, "ds_id") for value in self.parameters())  # DeepSpeed loads them itself
        self._problems = compare(shapes, self.shapes()) if whole else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _after_load_state_dict(self, incompatible_keys) -> None:
        """Accept a state dict without a fuser: LLaVA's own loads the MLP and leaves the fuser unchanged."""
        total = sum(1 for _ in self.fuser.parameters())
        if self._problems:
            # with strict=True, PyTorch's own error follows
            logger.warning("this state dict does not fit the projector: %s", self._problems)
        if self.num_loaded == 0:
            missing = [key for key in incompatible_keys.missing_keys if ("." + key).rpartition(".fuser.")[1]]
            for key in missing:
                incompatible_keys.missing_keys.remove(key)
            logger.warning("none of %d fuser tensors is in this state dict; the fuser keeps its present weights", total)
        elif self.num_loaded is not None and (self._in_model or self.num_loaded < total):
            level = logging.INFO if self.num_loaded == total else logging.WARNING
            logger.log(level, "loaded %d of %d fuser tensors", self.num_loaded, total)
