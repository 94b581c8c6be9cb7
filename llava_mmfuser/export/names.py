"""What weights are called in LLaVA's format and in transformers' own, both ways. No file is opened here."""

import re
from typing import Optional

PROJECTOR = "model.multi_modal_projector."
TOWER_IN_LLAVA = "model.vision_tower.vision_tower."
_MARK = "model.mm_projector."
_NATIVE = re.compile(r"(?:model\.)?(language_model|vision_tower|multi_modal_projector)\.(.+)")


def to_native(name: str) -> str:
    """transformers' name of a weight of a LLaVA model, in the spelling that every version since 4.52 reads."""
    if name.startswith(_MARK):
        layer, dot, rest = name[len(_MARK) :].partition(".")
        if layer == "fuser":
            return f"{PROJECTOR}fuser.{rest}"
        return f"{PROJECTOR}linear_{int(layer) // 2 + 1}.{rest}" if dot else f"{PROJECTOR}linear_1.{layer}"
    if name.startswith(TOWER_IN_LLAVA):
        return "model.vision_tower." + name[len(TOWER_IN_LLAVA) :]
    return re.sub(r"^model\.", "model.language_model.", name)


_RELEASED = {  # today's spelling to that of llava-hf's folders
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def to_released(name: str) -> str:
    """A name in the spelling of ``llava-hf``'s folders, which versions before 4.52 read, too."""
    return next((old + name[len(new) :] for new, old in _RELEASED.items() if name.startswith(new)), name)


def from_released(name: str) -> str:
    """The inverse of `to_released`: transformers from 5.24 on does not translate it for code in a folder."""
    return next((new + name[len(old) :] for new, old in _RELEASED.items() if name.startswith(old)), name)


def to_llava(name: str, linear: bool = False) -> Optional[str]:
    """The inverse of `to_native`, which also takes the spellings that older and newer versions save; None for others.

    The Linear of a `linear` projector, behind the fuser, has no number in LLaVA.
    """
    if name == "lm_head.weight":
        return name
    match = _NATIVE.fullmatch(name)
    if match is None:
        return None
    part, rest = match.groups()
    if part == "language_model":
        return rest if rest.startswith("lm_head.") else "model." + re.sub(r"^model\.", "", rest)
    if part == "vision_tower":
        return f"{TOWER_IN_LLAVA}vision_model." + re.sub(r"^vision_model\.", "", rest)
    layer = re.match(r"linear_(\d+)\.", rest)
    if layer is None:
        return _MARK + rest
    return _MARK + rest[layer.end() :] if linear else f"{_MARK}{2 * int(layer[1]) - 2}.{rest[layer.end() :]}"
