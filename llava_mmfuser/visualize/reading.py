"""Reads the vision tower and the fuser of a checkpoint, and never the language model."""

import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn

from ..block.fusion import Fusion
from ..block.kinds import FUSIONS
from ..checkpoints.files import read_config
from ..checkpoints.folder import Checkpoint, read_checkpoint
from ..checkpoints.verdict import DRAW, judge
from ..config import MMFuserConfig
from ..layers import LAYER_SETS, Layers
from ..names import MARK, differences, is_fused, rename_published, without_wrapper
from ..towers import TOWERS, kind_of, tower_config

_TOWER_MARK = "vision_tower.vision_tower."


class Model(NamedTuple):
    label: str
    tower: Any  # a vision model of transformers
    processor: Any  # its image processor
    fuser: Fusion
    settings: MMFuserConfig  # with explicit layers
    aspect_ratio: Optional[str]  # LLaVA's image_aspect_ratio
    notes: List[str]  # what the user should know, one line each


def read_model(
    path: str,
    base: Optional[str] = None,
    vision_tower: Optional[str] = None,
    layers: Optional[str] = None,
    device: Optional[str] = None,
) -> Model:
    """Read a vision tower and its fuser, in float32. A model without a fuser gets a fresh one, which is the identity.

    Args:
        path: folder of a checkpoint, adapter, LoRA, released LLaVA or vision tower; or its name on the hub.
        base: folder or name with the weights that `path` lacks, such as a projector that LoRA left frozen.
        vision_tower: None means ``mm_vision_tower`` of config.json.
        layers: for a model without a fuser, see `Layers.parse`; None means ``mm_vision_select_layer``, else -2.
        device: None means cuda where there is one, else cpu.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch has no common type for this
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    config = read_config(_folder(path, "config.json"))
    if config is None:
        raise ValueError(f"{path} has no config.json; name a folder of a LLaVA or of a {' or '.join(TOWERS)} tower")
    bare = kind_of(config.get("model_type")) is not None
    name: Any = vision_tower or (path if bare else config.get("mm_vision_tower"))
    try:
        known = tower_config(name) if isinstance(name, str) else None
    except ValueError as error:
        raise ValueError(f"{error}; name a folder that has it by --vision-tower PATH") from error
    settings = MMFuserConfig() if bare else judge(Checkpoint(path, config), DRAW, known).check()
    if known is None:
        raise ValueError("config.json has no mm_vision_tower; give --vision-tower PATH")
    if not is_fused(config):
        query = Layers.parse(config.get("mm_vision_select_layer", -2))
        if layers in LAYER_SETS:
            query = Layers.parse_listed(layers, query, "--layers")
        elif layers is not None:
            query = Layers.parse(layers, "--layers")
        settings = MMFuserConfig(layers=query)
    elif layers is not None:
        raise ValueError(f"--layers={layers}, but {path} has a fuser, which knows its layers; drop the flag")
    settings = settings.resolve(known)
    label, folders, notes = os.path.basename(os.path.abspath(path)), [path] + ([base] if base else []), []
    fuser = settings.build(known.hidden_size, config.get("hidden_size", known.hidden_size) if is_fused(config) else 1)
    weights, source = _stored(folders, MARK, "fuser.") if is_fused(config) else ({}, "")
    if weights:
        _load(fuser, weights, source)
        notes.append(f"fuser: {len(weights)} tensors from {source}")
        if fuser.acts_in_first_layer:
            notes.append(f"fuser: {settings.fusion} acts in the projector's first layer; the map is the query's")
    elif not FUSIONS[settings.fusion].has_weights:
        notes.append(f"fuser: {settings.fusion}, which has no weights")
    else:
        notes.append(f"fuser: no weights in {' or '.join(folders)}; a fresh one is shown, which is the identity")
        label += ", fresh fuser"

    tower, processor = _read_tower(name, known.kind)
    if config.get("unfreeze_mm_vision_tower") or "mm_vision_tower" in str(config.get("mm_tunable_parts")):
        weights, source = _stored(folders, _TOWER_MARK)
        if weights:
            _load(tower, {key: value for key, value in weights.items() if not key.endswith("position_ids")}, source)
        notes.append(f"vision tower: {f'{len(weights)} tuned tensors from {source}' if weights else name}")
    aspect_ratio = "pad" if bare else config.get("image_aspect_ratio")
    if aspect_ratio == "anyres":
        notes.append("image_aspect_ratio=anyres: the overview of the whole picture is shown, not its tiles")
    return Model(label, tower.to(place), processor, fuser.to(place).eval(), settings, aspect_ratio, notes)


def _folder(path: str, *patterns: str) -> str:
    """The folder itself, or the cached folder of a name on the hub; missing files are downloaded."""
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise ValueError(f"{path} is a file; name the folder that has it and a config.json")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no folder on this machine, and cannot be downloaded: {error}") from error


def _stored(folders: Sequence[str], mark: str, prefix: str = "") -> Tuple[Dict[str, torch.Tensor], str]:
    """Tensors of the first folder that has any, and that folder.

    The tensors bear our names, without what precedes `mark` and without `prefix`. In the folder of a whole model only
    the model's own files count, as in LLaVA's loading.
    """
    for folder in (_folder(folder, "*.json", "*.safetensors", "*.bin") for folder in folders):
        checkpoint = read_checkpoint(folder)
        weights = [weight for file in checkpoint.shards or checkpoint.adapters for weight in checkpoint.weights[file]]
        found = {weight.name.split(mark, 1)[1]: weight for weight in weights if mark in weight.name}
        without_wrapper(found)
        rename_published(found)
        found = {name[len(prefix) :]: weight for name, weight in found.items() if name.startswith(prefix)}
        if found:
            return {name: weight.read().float() for name, weight in found.items()}, folder
    return {}, ""


def _load(module: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
    problems = differences({name: tuple(value.shape) for name, value in weights.items()}, expected)
    if problems:
        raise ValueError(f"{source}: weights do not fit its config.json: {problems}")
    module.load_state_dict(weights, strict=False)  # all parameters are there; buffers are not stored


def _read_tower(name: str, kind: str) -> Tuple[Any, Any]:
    """A tower's vision model and image processor."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else transformers lists every weight of CLIP's text model
    try:
        model, processor_class = map(TOWERS[kind].transformers_class, ("VisionModel", "ImageProcessor"))
        tower, info = model.from_pretrained(name, output_loading_info=True)
        processor = processor_class.from_pretrained(name)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the vision tower {name!r} cannot be read: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"the vision tower {name!r} lacks weights: {', '.join(info['missing_keys'][:3])} …")
    return tower.float().eval(), processor
