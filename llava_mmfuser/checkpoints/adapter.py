"""Adapters (``mm_projector.bin``, ``non_lora_trainables.bin``): read once, and refused unless they fit."""

import dataclasses
import os
from typing import Any, Dict, Mapping, Optional

import torch

from ..block.kinds import FUSIONS
from ..config import MMFuserConfig
from ..names import MARK, Shapes, compare, describe, has_fuser, is_fused, rename_published, without_wrapper
from .files import read_config, read_tensors
from .verdict import other_setting, settings_of


def read_adapter(path: str, optional: bool = False) -> Dict[str, torch.Tensor]:
    """Read the projector's tensors from ``mm_projector.bin`` or ``non_lora_trainables.bin``.

    Args:
        path: the file.
        optional: whether it may have none, as where LoRA was trained with a frozen projector.

    Returns:
        Names, without the part up to ``mm_projector.``, to tensors on the CPU; the authors' names are left as they are.

    Raises:
        ValueError: see `read_tensors`; or the file has no weights of a projector.
    """
    state_dict = read_tensors(path)
    projector = {name.split(MARK, 1)[1]: value for name, value in state_dict.items() if MARK in name}
    without_wrapper(projector)
    if not projector and not optional:
        raise ValueError(
            f"{path} has no weights of a projector (no name with {MARK!r}); it looks like {describe(state_dict)}; "
            f"its first names: {', '.join(list(state_dict)[:3]) or 'none'}"
        )
    return projector


def match_adapter(
    path: str,
    weights: Dict[str, torch.Tensor],
    settings: MMFuserConfig,
    expected: Optional[Shapes],
    vision_config: Any = None,
) -> Dict[str, torch.Tensor]:
    """Refuse what `read_adapter` read unless it fits. An adapter without a fuser fits if the inner projector does.

    Args:
        path: of the file; a ``config.json`` beside it is read, too.
        weights: what was in it; none fit everything.
        settings: of this run or checkpoint.
        expected: see `check_shapes`; None to skip that.
        vision_config: of the vision tower, to compare the layers with those in the ``config.json`` of the adapter;
            None to skip that.

    Returns:
        The tensors under our names, without ``mm_projector.``.

    Raises:
        ValueError: see `check_shapes`; or an adapter trained with other layers or settings.
    """
    kind, weights = describe(weights), dict(weights)
    rename_published(weights, linear=settings.projector == "linear")
    if expected is not None and weights:
        check_shapes(path, weights, expected, kind)
    config = read_config(os.path.dirname(path)) or {}
    if vision_config is not None and is_fused(config):
        trained = dataclasses.replace(settings_of(config), projector=settings.projector)
        if has_fuser(weights) or not all(FUSIONS[of.fusion].has_weights for of in (settings, trained)):
            other = other_setting(trained.resolve(vision_config), settings)
            if other is not None:
                name, before, now = other
                raise ValueError(
                    f"{path} was trained with {name}={before}, but this run has {now}; add --{name} {before}"
                )
    return weights


def check_shapes(path: str, weights: Mapping[str, torch.Tensor], expected: Shapes, kind: str) -> None:
    """Refuse an adapter's weights under our names unless they are those of a projector.

    Args:
        path: of the file.
        weights: see `match_adapter`.
        expected: names and shapes of the projector's weights, see `expected_shapes`.
        kind: what the file looks like, see `describe`.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, all listed by name.
    """
    problems = compare({name: tuple(value.shape) for name, value in weights.items()}, expected)
    if problems:
        raise ValueError(f"{path} does not fit this model's projector: {problems}. It looks like {kind}")
