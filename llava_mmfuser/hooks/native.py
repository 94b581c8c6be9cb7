"""Hooks in transformers' own LLaVA, which reads exported folders.

If config.json has ``mm_fuser_fusion``, the stock classes get the fuser. So programs that ignore a folder's code run it,
too.
"""

from typing import Any


def has_fuser(self: Any, config: Any) -> bool:
    return hasattr(config, "mm_fuser_fusion")


def projector_init(original, self, config):
    from ..export.modeling_llava_mmfuser import LlavaMMFuserProjector

    if type(config).__module__.startswith("transformers."):  # auto_map names code that stock classes do not save
        vars(config).pop("auto_map", None)
    self.__class__ = LlavaMMFuserProjector
    LlavaMMFuserProjector.__init__(self, config)


def init_weights(original, self, module):
    from ..export.modeling_llava_mmfuser import reset_missing

    return None if reset_missing(module) else original(self, module)
