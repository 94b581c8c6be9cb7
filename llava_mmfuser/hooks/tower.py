"""Makes LLaVA's `CLIPVisionTower` and LLaVA-NeXT's `SigLipVisionTower` return several layers for a fuser."""

from typing import Any

from ..checkpoints.verdict import check_tower
from ..config import MMFuserConfig, asks_for_fuser
from ..hidden_states import return_layers
from ..towers import check_features, check_name, tower_config


def init(original, self, vision_tower, *args, **kwargs):
    config: Any = next(value for value in (*args, *kwargs.values()) if asks_for_fuser(value))
    check_features(self)
    check_features(config)
    tower = tower_config(vision_tower)
    check_features(config, tower.kind)
    check_name(vision_tower, tower.kind)
    layers = MMFuserConfig.from_llava(config).resolve(tower).layers
    if hasattr(config, "mm_hidden_size"):  # a config.json, not `ModelArguments`
        check_tower(config, tower)
    original(self, vision_tower, *args, **kwargs)
    return_layers(self, layers)
