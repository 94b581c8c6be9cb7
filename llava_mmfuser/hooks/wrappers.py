"""What PEFT and DeepSpeed put around a projector and its parameters."""

import contextlib
from typing import Any, ContextManager, Iterable, Optional

from torch import nn

from ..projector import MMFuserProjector


def is_wrapper(module: Any) -> bool:
    """Whether it is what PEFT's ``modules_to_save`` puts around a module: the frozen original beside trained copies."""
    return isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def unwrapped(module: Any) -> Any:
    """The copy in use where PEFT's ``modules_to_save`` has wrapped a module, else the module itself."""
    if not is_wrapper(module):
        return module
    name = module.active_adapter
    return module.modules_to_save[name] if name in module.modules_to_save else module.original_module


def find_projector(model: nn.Module) -> Optional[MMFuserProjector]:
    """The projector with fuser that a model uses, wrapped by PEFT or not; None where there is none."""
    return next((module for module in map(unwrapped, model.modules()) if isinstance(module, MMFuserProjector)), None)


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: Optional[int] = None) -> ContextManager:
    """Context in which parameters are whole, also under ZeRO-3; every rank must enter it.

    Args:
        parameters: any parameters.
        modifier_rank: rank whose changes all others receive on leaving, None if nothing is changed.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)
