"""The vision tower and the fuser of a checkpoint; the language model is never built."""

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
    """A vision tower and a fuser, `MMFuser` or one of its rivals."""

    label: str
    tower: Any  # transformers' model of it
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
    """Read a vision tower and, where there is one, a fuser; else a fresh fuser, which is the identity.

    Args:
        path: checkpoint, adapter or LoRA folder of any format, released LLaVA, or vision tower; or its name on the hub.
        base: where to look for weights that are not in `path`, as those of a projector that LoRA left frozen.
        vision_tower: the tower, if not ``mm_vision_tower`` of config.json.
        layers: for a model without a fuser, see `Layers.parse`; None takes ``mm_vision_select_layer``, else -2.
        device: of the computation, which is in float32; None takes cuda where there is one, else cpu.
    """
    place = _device(device)
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
        if layers is not None:
            named = layers in LAYER_SETS
            query = Layers.parse_listed(layers, query, "--layers") if named else Layers.parse(layers, "--layers")
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


def _device(name: Optional[str]) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch has no common type for this
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _folder(path: str, *patterns: str) -> str:
    """A folder as it is; of a name on the hub the folder in the cache, after a download where files are missing."""
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
    """Tensors, by our names behind `mark` and `prefix`, of the first folder that has any, and that folder. Of a whole
    model only its own files count, as in LLaVA's loading."""
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
    """The model and the image processor of a tower, such as a `CLIPVisionModel` and a `CLIPImageProcessor`."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists every weight of a whole CLIP that is of the text model
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
