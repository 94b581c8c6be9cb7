"""What weights are called, LLaVA's, ours and the authors', and what kind of file has which. Opens no file."""

import enum
import re
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple

import torch

from .block.mmfuser import PUBLISHED_NAMES
from .config import PROJECTOR_TYPE, MMFuserConfig, read_setting
from .layers import is_listed

MARK = "mm_projector."
_FROM_OURS = {ours: theirs for theirs, ours in PUBLISHED_NAMES.items()}
Shapes = Dict[str, Tuple[int, ...]]


def from_published(name: str, linear: bool = False) -> str:
    """Our name of a weight in the authors' projector, both as they are behind ``mm_projector.``.

    Theirs is ``Sequential(fuser, Linear, GELU, Linear, …)``; ours keeps LLaVA's own 0, 2, …, or no number if `linear`.
    """
    first, _, rest = name.partition(".")
    if first == "0":
        return "fuser." + PUBLISHED_NAMES.get(rest, rest)
    return rest if linear else f"{int(first) - 1}.{rest}"


def to_published(name: str) -> str:
    """The inverse of `from_published`."""
    first, _, rest = name.partition(".")
    if first == "fuser":
        return "0." + _FROM_OURS.get(rest, rest)
    return f"{int(first) + 1}.{rest}" if rest else f"1.{first}"


def is_published(names: Iterable[str]) -> bool:
    """Whether names of a projector's weights, without the part up to ``mm_projector.``, are the authors'."""
    return "0.gamma1" in names


def rename_published(state_dict: Dict[str, Any], prefix: str = "", linear: bool = False) -> None:
    """Give the tensors of an authors' adapter, whose names begin with `prefix`, our names, in place; leave every other
    state dict alone. For `linear` see `from_published`."""
    if is_published(key[len(prefix) :] for key in state_dict if key.startswith(prefix)):
        for key in [key for key in state_dict if re.match(r"\d+\.", key[len(prefix) :]) and key.startswith(prefix)]:
            state_dict[prefix + from_published(key[len(prefix) :], linear)] = state_dict.pop(key)


def without_wrapper(state_dict: Dict[str, Any], prefix: str = "") -> None:
    """Give a projector's tensors that were saved from within PEFT's ``modules_to_save`` their own names, in place.

    Of the frozen original and its trained copy the copy is kept. For `prefix` see `rename_published`.
    """
    for key in sorted(key for key in state_dict if key.startswith(prefix)):
        wrapped = re.fullmatch(r"(modules_to_save\.[^.]+|original_module)\.(.+)", key[len(prefix) :])
        if wrapped:  # in this order: the copies, then what has none
            state_dict.setdefault(prefix + wrapped[2], state_dict.pop(key))


def has_fuser(names: Iterable[str]) -> bool:
    """Whether names of weights, whole or from behind ``mm_projector.``, are of a projector with fuser of any format."""
    return any(name.rpartition(MARK)[2].startswith(("fuser.", "0.gamma1")) for name in names)


def expected_shapes(settings: MMFuserConfig, mm_hidden_size: int, hidden_size: int) -> Shapes:
    """Names behind ``mm_projector.`` and shapes of all weights of a projector with fuser, from the vision tower's width
    and the language model's."""
    with torch.device("meta"):
        fuser = settings.build(mm_hidden_size, hidden_size)
    of_fuser = {"fuser." + name: tuple(parameter.shape) for name, parameter in fuser.named_parameters()}
    if settings.projector == "linear":
        return {"weight": (hidden_size, mm_hidden_size), "bias": (hidden_size,), **of_fuser}
    shapes: Shapes = {}
    for layer in range(int(re.findall(r"\d+", settings.projector)[0])):
        width = hidden_size if layer else mm_hidden_size
        shapes.update({f"{2 * layer}.weight": (hidden_size, width), f"{2 * layer}.bias": (hidden_size,)})
    return {**shapes, **of_fuser}


def describe(names: Iterable[str]) -> str:
    """What kind of file has these names of weights, which are whole or from behind ``mm_projector.``."""
    names = list(names)
    projector = [name.split(MARK, 1)[1] for name in names if MARK in name]
    if any(re.search(r"lora_[AB]", name) for name in names):
        return "LoRA weights of a language model"
    if any(re.search(r"(^|\.)(layers|blocks|encoder)\.\d+\.|lm_head", name) for name in names):
        return "weights of a whole model" + ("" if projector else ", without a projector")
    projector = projector or names
    if is_published(projector):
        return "an adapter of the authors' MMFuser fork"
    if has_fuser(projector):
        return "an adapter of llava_mmfuser"
    if projector and set(projector) <= {"weight", "bias"}:
        return "an adapter of LLaVA with a linear projector"
    if projector and all(re.fullmatch(r"\d+\.(weight|bias)", name) for name in projector):
        return f"an adapter of LLaVA with an mlp{len(projector) // 2}x_gelu projector"
    return "unknown" if names else "empty"


def compare(found: Shapes, expected: Shapes) -> Optional[str]:
    """`differences`, but without any fuser weight, only the inner projector counts."""
    if not has_fuser(found):
        expected = {name: shape for name, shape in expected.items() if not name.startswith("fuser.")}
    return differences(found, expected)


def differences(found: Shapes, expected: Shapes) -> Optional[str]:
    """Missing, unexpected and wrongly shaped weights by name, or None."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return "; ".join(problems) or None


class Format(enum.Enum):
    """What kind of checkpoint a folder holds, in words."""

    OURS = "llava_mmfuser's format"
    AUTHORS = "the authors' format"
    LLAVA = "plain LLaVA, without a fuser"
    NATIVE = "a LLaVA in transformers' own format"
    OTHER = "no LLaVA"


def format_of(config: Mapping[str, Any], projectors: Iterable[Iterable[str]]) -> Format:
    """Which format a config.json and the names of the weights of its projectors, if it has any, are."""
    if is_native(config):
        return Format.NATIVE
    if any(map(is_published, projectors)) or is_authors_config(config):
        return Format.AUTHORS
    if is_fused(config):
        return Format.OURS
    return Format.LLAVA if {"mm_vision_tower", "mm_projector_type"} & set(config) else Format.OTHER


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a LLaVA in transformers' own format, as `export` and ``llava-hf`` have it."""
    return config.get("model_type") == "llava" and "vision_config" in config


def is_fused(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that there is a fuser, ours or the authors'."""
    return config.get("mm_projector_type") == PROJECTOR_TYPE or is_authors_config(config)


def is_authors_config(config: Any) -> bool:
    """Whether a config (dict or object) is of a checkpoint of the authors' fork: a list of layers in any spelling, no
    projector type of its own."""
    listed = is_listed(read_setting(config, "mm_vision_select_layer"))
    return listed and read_setting(config, "mm_projector_type") != PROJECTOR_TYPE
