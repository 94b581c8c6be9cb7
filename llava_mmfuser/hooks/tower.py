"""LLaVA's `CLIPVisionTower` and LLaVA-NeXT's `SigLipVisionTower`, which return several layers under a fuser."""

from typing import Any

from ..checkpoints.verdict import check_tower
from ..config import PROJECTOR_TYPE, MMFuserConfig, read_setting
from ..layers import spell
from ..names import convert_hint, is_authors_config
from ..towers import check_features, check_name, return_layers, tower_config
from .run import RUN


def init(original, self, vision_tower, args, delay_load=False):
    if getattr(args, "mm_projector_type", None) != PROJECTOR_TYPE:
        refuse_layer_list(args)
        return original(self, vision_tower, args, delay_load)
    check_features(self)
    run = getattr(args, RUN, None)
    settings = _settings_of_checkpoint(args, vision_tower) if run is None else run.settings
    original(self, vision_tower, args, delay_load)
    return_layers(self, settings.layers)


def init_siglip(original, self, vision_tower, vision_tower_cfg, delay_load=False):
    init(original, self, vision_tower, vision_tower_cfg, delay_load)


def _settings_of_checkpoint(config: Any, vision_tower: str) -> MMFuserConfig:
    """Of a config.json, checked against the tower's, before the tower's weights are read."""
    check_features(config)
    vision_config = tower_config(vision_tower)
    check_features(config, vision_config.kind)
    check_name(vision_tower, vision_config.kind)
    settings = MMFuserConfig.from_llava(config).resolve(vision_config)
    if hasattr(config, "mm_hidden_size"):  # not of arguments that somebody made by hand
        check_tower(config, vision_config)
    return settings


def refuse_layer_list(args: Any) -> None:
    if is_authors_config(args):
        raise ValueError(
            f"mm_vision_select_layer={spell(read_setting(args, 'mm_vision_select_layer'))} is a list, which needs "
            f"mm_projector_type={PROJECTOR_TYPE}, but it is {read_setting(args, 'mm_projector_type')!r}; in a "
            f"config.json this means {convert_hint(read_setting(args, '_name_or_path') or 'IN')}"
        )
