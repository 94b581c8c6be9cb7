"""What PEFT and DeepSpeed put around a projector and its parameters."""

import contextlib
from typing import Any, ContextManager, Iterable, Iterator, Optional

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


def config_of(model: nn.Module) -> Any:
    """The config of the LLaVA in a model, which may lie in a module without one."""
    return next((module for module in model.modules() if hasattr(module, "get_vision_tower")), model).config


@contextlib.contextmanager
def replaced(instance: Any, name: str, function: Any) -> Iterator[None]:
    """Within this context a method of one instance is another function."""
    before = vars(instance).get(name)
    setattr(instance, name, function)
    try:
        yield
    finally:
        delattr(instance, name) if before is None else setattr(instance, name, before)


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
