"""Looks through the wrappers of PEFT and DeepSpeed around a projector and its parameters."""

import contextlib
from typing import Any, ContextManager, Iterable, Iterator, Optional

from torch import nn

from ..projector import MMFuserProjector


def is_wrapper(module: Any) -> bool:
    """Whether this is PEFT's wrapper for ``modules_to_save``, which holds the frozen original and trained copies."""
    return isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def unwrapped(module: Any) -> Any:
    """The active copy in PEFT's wrapper for ``modules_to_save``; a module without wrapper comes back as it is."""
    if not is_wrapper(module):
        return module
    name = module.active_adapter
    return module.modules_to_save[name] if name in module.modules_to_save else module.original_module


def find_projector(model: nn.Module) -> Optional[MMFuserProjector]:
    """The projector with a fuser that a model uses, without PEFT's wrapper, or None."""
    return next((module for module in map(unwrapped, model.modules()) if isinstance(module, MMFuserProjector)), None)


def config_of(model: nn.Module) -> Any:
    """The config of the LLaVA in a model, or the model's own, or None; a wrapper around LLaVA may lack one."""
    llava = next((module for module in model.modules() if hasattr(module, "get_vision_tower")), model)
    return getattr(llava, "config", None)


@contextlib.contextmanager
def replaced(instance: Any, name: str, function: Any) -> Iterator[None]:
    """Within this context, another function replaces a method of one instance."""
    before = vars(instance).get(name)
    setattr(instance, name, function)
    try:
        yield
    finally:
        delattr(instance, name) if before is None else setattr(instance, name, before)


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: Optional[int] = None) -> ContextManager:
    """Context in which parameters are whole, even under ZeRO-3. Every rank must enter it.

    Args:
        modifier_rank: on exit, all ranks receive this rank's changes; None means no changes.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)
