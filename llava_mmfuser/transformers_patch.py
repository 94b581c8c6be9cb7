"""Everything this package does to transformers' own LLaVA, as one table (`PATCHES`); the other host's is `llava_patch`.

A folder whose config.json says ``mm_fuser_fusion``, as `export` writes it, gets its fuser in the stock classes, too, so
that programs which ignore the code in a folder run it. Every other folder is loaded as without this package.
"""

from typing import Any, Optional

from .patching import Patch, applied, check_row, replace, restore

HOST = "transformers.models.llava.modeling_llava"
_REGISTRY = "transformers has a registry of projectors"


def projector_init(original, self, config):
    if not hasattr(config, "mm_fuser_fusion"):
        return original(self, config)
    from .export.modeling_llava_mmfuser import LlavaMMFuserProjector

    if type(config).__module__.startswith("transformers."):  # the stock classes do not save the code that this names
        vars(config).pop("auto_map", None)
    self.__class__ = LlavaMMFuserProjector
    LlavaMMFuserProjector.__init__(self, config)


def init_weights(original, self, module):
    from .export.modeling_llava_mmfuser import reset_missing

    return None if reset_missing(module) else original(self, module)


# fmt: off
PATCHES = (
    Patch(HOST + ":LlavaMultiModalProjector.__init__", projector_init, "self config",
          "a config.json with mm_fuser_fusion gets its fuser in front of the projector", _REGISTRY),
    Patch(HOST + ":LlavaPreTrainedModel._init_weights", init_weights, "self module",
          "fuser weights missing from a folder start as identity", "transformers leaves it to a module how it starts"),
    Patch(HOST + ":LlavaModel.get_image_features", None, "self pixel_values vision_feature_layer",
          "not replaced, but it gives the projector several layers side by side", _REGISTRY),
)
# fmt: on


def apply(module: str = HOST) -> None:
    """Apply all rows or, where one does not fit this transformers, none: a folder with a fuser then ends in its error
    about weights of another size. Idempotent."""
    if HOST in applied:
        return
    states = [(row, *check_row(row)) for row in PATCHES]
    problems = [f"{row.target}: {detail}" for row, state, detail in states if state != "ok"]
    for row in PATCHES if not problems else ():
        if row.replacement is not None:
            replace(row.target, row.replacement)
    applied[HOST] = "; ".join(problems) or None


def revert(module: Optional[Any] = None) -> bool:
    """Put the originals back; returns whether there was anything to undo."""
    if HOST not in applied or module not in (None, HOST):
        return False
    restore(row.target for row in PATCHES)
    del applied[HOST]
    return True
