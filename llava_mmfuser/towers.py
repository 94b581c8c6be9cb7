"""The kinds of vision towers (`TOWERS`), their configs, and checks that a fuser can read them.

Layers are indices of the whole model's `hidden_states`, even where LLaVA deletes the last blocks. So LLaVA's default
map is -2 of a CLIP tower and of a SigLIP tower.
"""

import os
import re
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch

from .block.kinds import MAX_LAYERS, MAX_WIDTH, check_count
from .config import PROJECTOR_TYPE, read_setting

SELECT_FEATURES = ("patch", "cls_patch")


class Tower(NamedTuple):
    """One kind of vision tower."""

    model_types: Tuple[str, ...]  # model_type in config.json, of the whole model and of its vision part
    prefix: str  # of the class names in transformers
    on_hub: str  # regular expression of the names that LLaVA looks for on the hub
    has_cls: bool
    num_deleted: int  # number of last blocks that LLaVA deletes

    def transformers_class(self, ending: str) -> Any:
        """A class of transformers: for CLIP, VisionModel gives `CLIPVisionModel`."""
        import transformers

        return getattr(transformers, self.prefix + ending)


TOWERS: Dict[str, Tower] = {
    "CLIP": Tower(("clip", "clip_vision_model"), "CLIP", r"openai|laion|.*ShareGPT4V", True, 0),
    "SigLIP": Tower(("siglip", "siglip_vision_model"), "Siglip", ".*siglip", False, 1),
}


class TowerConfig(NamedTuple):
    """The properties of a vision tower that a fuser depends on."""

    kind: str  # a key of `TOWERS`
    hidden_size: int
    num_hidden_layers: int  # number of blocks in the whole model
    num_deleted: int  # number of last blocks that LLaVA deletes


def kind_of(model_type: Any) -> Optional[str]:
    """The key in `TOWERS` for a ``model_type``, or None."""
    return next((kind for kind, row in TOWERS.items() if model_type in row.model_types), None)


def tower_config(name: str, local_files_only: bool = False) -> TowerConfig:
    """Read the config of a vision tower (folder or name on the hub), not its weights.

    Raises:
        ValueError: the config cannot be read, or `TOWERS` lacks its kind.
    """
    from transformers import PretrainedConfig

    try:
        found = PretrainedConfig.get_config_dict(name, local_files_only=local_files_only)[0].get("model_type")
        kind = kind_of(found)
        if kind is not None:
            row = TOWERS[kind]
            config = row.transformers_class("VisionConfig").from_pretrained(name, local_files_only=local_files_only)
            check_count(config.hidden_size, MAX_WIDTH, f"vision_tower={name!r}: hidden_size")
            check_count(config.num_hidden_layers, MAX_LAYERS, f"vision_tower={name!r}: num_hidden_layers")
            return TowerConfig(kind, config.hidden_size, config.num_hidden_layers, row.num_deleted)
    except (OSError, TypeError, AttributeError) as error:  # JSON that is no object raises the last two
        reason = str(error).splitlines()[0]
        raise ValueError(f"the config of the vision tower {name!r} cannot be read: {reason}") from error
    raise ValueError(
        f"vision_tower={name!r} has model_type={found!r}, but mm_projector_type={PROJECTOR_TYPE} needs a "
        f"{' or '.join(TOWERS)} tower, such as openai/clip-vit-large-patch14-336"
    )


def check_features(source: Any, kind: Optional[str] = None) -> None:
    """Refuse settings whose features no fuser can read.

    Args:
        source: a tower, a config (dict or object) or `ModelArguments`.
        kind: the tower's key in `TOWERS`; None means unknown.

    Raises:
        ValueError: ``s2``, ``mm_resampler_type``, or a ``mm_vision_select_feature`` that is not in `SELECT_FEATURES` or
            that the tower lacks.
    """
    if read_setting(source, "s2") or hasattr(source, "forward_feature"):  # S2 puts several scales side by side
        raise ValueError(f"s2=True together with mm_projector_type={PROJECTOR_TYPE} is not supported; set s2 to False")
    select_feature = read_setting(source, "mm_vision_select_feature") or SELECT_FEATURES[0]
    if select_feature not in SELECT_FEATURES:
        allowed = " or ".join(SELECT_FEATURES)
        raise ValueError(f"mm_vision_select_feature={select_feature!r} is not allowed; use {allowed}")
    resampler = read_setting(source, "mm_resampler_type")
    if resampler is not None:
        raise ValueError(
            f"mm_resampler_type={resampler!r} together with mm_projector_type={PROJECTOR_TYPE} is not supported, "
            f"because LLaVA-NeXT takes the projector's width from it; drop the flag"
        )
    if kind is not None and select_feature != "patch" and not TOWERS[kind].has_cls:
        raise ValueError(f"mm_vision_select_feature={select_feature!r}, but a {kind} tower has no CLS; use patch")


def check_name(name: str, kind: str) -> None:
    """Raise ValueError for a folder with another tower than CLIP: LLaVA takes every folder for a CLIP tower."""
    if kind != "CLIP" and os.path.exists(name):
        raise ValueError(
            f"vision_tower={name!r} is a folder with a {kind} tower, but LLaVA takes every folder for a CLIP tower; "
            f"LLaVA-NeXT knows a {kind} tower by its name on the hub, such as google/siglip-so400m-patch14-384, which "
            f"HF_HUB_OFFLINE=1 looks for in the cache alone"
        )


def local_tower(config: Mapping[str, Any]) -> Optional[TowerConfig]:
    """The config of a checkpoint's vision tower, or None if it is not on this machine."""
    try:
        return tower_config(str(config.get("mm_vision_tower")), local_files_only=True)
    except ValueError:
        return None


def check_tower_is_there(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose vision tower LLaVA cannot find.

    Raises:
        ValueError: ``mm_vision_tower`` is a folder without a tower's config, or neither a folder nor a name that
            `build_vision_tower` knows.
    """
    name = str(config.get("mm_vision_tower"))
    if os.path.exists(name):
        check_name(name, tower_config(name, local_files_only=True).kind)
    elif not any(re.match(row.on_hub, name) for row in TOWERS.values()):
        relative = "" if os.path.isabs(name) else f" (seen from {os.getcwd()})"
        raise ValueError(
            f"mm_vision_tower={name!r} in config.json is no folder on this machine{relative}, and LLaVA does not look "
            f"for it on the hub; write where the vision tower is"
        )


def select_tokens(hidden_state: torch.Tensor, select_feature: str, has_cls: bool = True) -> torch.Tensor:
    """Apply LLaVA's ``mm_vision_select_feature``: ``patch`` drops CLS from [B, 1+N, C], ``cls_patch`` keeps it.

    Without CLS, [B, N, C] stays as it is.

    Raises:
        ValueError: another select_feature.
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(
            f"mm_vision_select_feature={select_feature!r} is not allowed; use {' or '.join(SELECT_FEATURES)}"
        )
    return hidden_state[:, 1:] if has_cls and select_feature == "patch" else hidden_state
