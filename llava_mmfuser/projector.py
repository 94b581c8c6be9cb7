"""MMFuserProjector: the fuser in front of LLaVA's own projector, which keeps its parameter names."""

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

    The projector's children and direct parameters are adopted under their own names (``0``, ``2``, or ``weight`` and
    ``bias`` for ``linear``), so that released checkpoints and adapters load by name; the block is ``fuser``. Adopting
    moves the objects: their dtype, device, quantisation and ZeRO partitioning stay.

    What others read from LLaVA's own is there: items, length and iteration of an MLP (``projector[0].weight.dtype``),
    ``weight``, ``bias``, ``in_features`` and ``out_features`` of ``linear``; none of them includes the block, so
    in_features is C. It is no `nn.Sequential`, whose items, run in turn, would be all of it.

    Args:
        fuser: `MMFuser` or one of its rivals.
        projector: what LLaVA's `build_vision_projector` returns for ``linear`` or ``mlpNx_gelu``.
    """

    weight: nn.Parameter  # this and bias are there where the projector is ``linear``
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
        self.num_loaded: Optional[int] = None  # fuser tensors in the last state dict that had any of this projector's
        self.missing: List[str] = []  # fuser tensors that the checkpoint lacked from which this was loaded
        self.lr: Optional[float] = None  # of the fuser; None takes that of the projector
        self.gate_lr: Union[None, float, str] = None  # of what opens it; see `hooks.optimizer`
        self.log_gates = True  # whether the Trainer logs the fuser's gates
        self._in_model = False  # whether that was a whole model's
        self._problems: Optional[str] = None  # what that state dict lacked or had too much
        self.register_load_state_dict_post_hook(self._after_load_state_dict)

    @classmethod
    def build(cls, settings: MMFuserConfig, hidden_size: int, projector: nn.Module) -> "MMFuserProjector":
        """Put a fresh fuser for feature maps of width hidden_size in front of a projector.

        What is drawn at random afterwards is the same as without the fuser.
        """
        first = next(module for module in projector.modules() if isinstance(module, nn.Linear))
        with own_random_state():
            fuser = settings.build(hidden_size, first.out_features)
        return cls(fuser, projector)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Fuse and project what the patched vision tower returns.

        Args:
            features: [B, N, L*C], or [B, 1+N, L*C] with CLS first (``cls_patch``); N a square. The query layer's CLS
                passes the fuser unchanged.

        Returns:
            [B, N, D] or [B, 1+N, D], D the width of the language model; `block.rivals.TokenConcat` makes L*N of N.

        Raises:
            ValueError: a channel count that is not L*C, or a token count that is neither a square nor one more.
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

    def __bool__(self) -> bool:  # else it had to have a length
        return True

    def shapes(self) -> Shapes:
        """Names and shapes of all parameters, also where ZeRO-3 has partitioned them."""
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
        self._in_model = prefix != ""  # whoever loads the projector alone reports it
        # A shard of a whole model may hold any part of the projector; an adapter must hold all of it.
        whole = prefix == "" or (shapes and all(MARK in key for key in state_dict))
        whole = whole and not any(hasattr(value, "ds_id") for value in self.parameters())  # loaded by DeepSpeed itself
        self._problems = compare(shapes, self.shapes()) if whole else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _after_load_state_dict(self, incompatible_keys) -> None:
        """A projector's state dict without a fuser is LLaVA's own: the MLP is loaded and the fuser stays as it is."""
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
