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


def read_adapter(path: str) -> Dict[str, torch.Tensor]:
    """The projector's tensors in a file such as ``mm_projector.bin`` by their names, ours or the authors', behind
    ``mm_projector.``; raises ValueError if there are none, and as `read_tensors`."""
    state_dict = read_tensors(path)
    projector = {name.split(MARK, 1)[1]: value for name, value in state_dict.items() if MARK in name}
    without_wrapper(projector)
    if not projector:
        found = f"it looks like {describe(state_dict)}; its first names: {', '.join(list(state_dict)[:3]) or 'none'}"
        raise ValueError(f"{path} has no weights of a projector (no name with {MARK!r}); {found}")
    return projector


def match_adapter(
    path: str, weights: Dict[str, torch.Tensor], settings: MMFuserConfig, expected: Optional[Shapes], tower: Any = None
) -> Dict[str, torch.Tensor]:
    """Refuse what `read_adapter` read from `path` unless it fits; returns it under our names.

    An adapter without a fuser fits if the inner projector does. `settings` are of this run; for `expected` see
    `check_shapes`, and None skips that. `tower`, the vision tower's config, is to compare the settings with a
    ``config.json`` beside `path`; None skips that.
    """
    kind, weights = describe(weights), dict(weights)
    rename_published(weights, linear=settings.projector == "linear")
    if expected is not None:
        check_shapes(path, weights, expected, kind)
    config = read_config(os.path.dirname(path)) or {}
    if tower is not None and is_fused(config):
        trained = dataclasses.replace(settings_of(config), projector=settings.projector)
        if has_fuser(weights) or not all(FUSIONS[of.fusion].has_weights for of in (settings, trained)):
            other = other_setting(trained.resolve(tower), settings)
            if other is not None:
                name, before, now = other
                raise ValueError(
                    f"{path} was trained with {name}={before}, but this run has {now}; add --{name} {before}"
                )
    return weights


def check_shapes(path: str, weights: Mapping[str, torch.Tensor], expected: Shapes, kind: str) -> None:
    """Refuse an adapter's weights, under our names, unless they are `expected`; `kind` is their `describe`."""
    problems = compare({name: tuple(value.shape) for name, value in weights.items()}, expected)
    if problems:
        raise ValueError(f"{path} does not fit this model's projector: {problems}. It looks like {kind}")
