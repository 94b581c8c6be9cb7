"""Transformers' own LLaVA, which reads folders that `export` wrote.

A folder whose config.json says ``mm_fuser_fusion`` gets its fuser in the stock classes, too, so that programs which
ignore the code in a folder run it.
"""

from typing import Any


def has_fuser(self: Any, config: Any) -> bool:
    return hasattr(config, "mm_fuser_fusion")


def projector_init(original, self, config):
    from ..export.modeling_llava_mmfuser import LlavaMMFuserProjector

    if type(config).__module__.startswith("transformers."):  # the stock classes do not save the code that this names
        vars(config).pop("auto_map", None)
    self.__class__ = LlavaMMFuserProjector
    LlavaMMFuserProjector.__init__(self, config)


def init_weights(original, self, module):
    from ..export.modeling_llava_mmfuser import reset_missing

    return None if reset_missing(module) else original(self, module)
