"""What starts from a folder in transformers' own format: putting a fuser into it, and the way back to LLaVA's."""

import dataclasses
import os
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch

from ..block.kinds import MAX_LAYERS, MAX_WIDTH, check_count
from ..checkpoints import writing
from ..checkpoints.convert import check_out, finish, fuser_weights, upgrade_settings, with_new_shard
from ..checkpoints.files import Weight, float_weights, read_json, refuse_nan
from ..checkpoints.folder import FULL, Checkpoint, name_from_path, name_problem, read_checkpoint
from ..checkpoints.report import NAME_NOTE
from ..checkpoints.verdict import check_format, misfit
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig
from ..names import MARK, Format
from ..towers import TowerConfig, kind_of
from . import tokenizer
from .folder import LLAMA, PREPROCESSOR, VISION_TOWER, code, fuser_config, local_folder
from .names import PROJECTOR, TOWER_IN_LLAVA, from_released, to_llava

_FEATURES = {"default": "patch", "full": "cls_patch"}


def upgrade(source: str, out: str, link: bool = False, settings: Mapping[str, Any] = {}) -> List[str]:
    """Put a fresh fuser in front of the projector of a LLaVA in transformers' own format, such as ``llava-hf``'s.

    The result is in the same format, with the fuser's code in it, and answers bit for bit as the input.

    For the arguments and the notes that it returns see `convert.upgrade`.
    """
    link, notes = check_out(source, out, link)
    checkpoint, config = _read(source, "upgrade")
    first, projector = _projector(checkpoint)
    layer = config["vision_feature_layer"]
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer!r} in {source}/config.json: it fuses several layers already")
    vision = config["vision_config"]
    if kind_of(vision.get("model_type")) != "CLIP":
        raise ValueError(f"vision_config has model_type={vision.get('model_type')!r}; only CLIP towers are supported")
    tower = TowerConfig("CLIP", first.shape[1], vision["num_hidden_layers"], num_deleted=0)
    check_count(tower.hidden_size, MAX_WIDTH, "hidden_size of the vision tower")
    refuse_nan(projector.values())
    known = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": layer}
    resolved, _ = upgrade_settings(known, dict(settings), "vision_config", tower)
    fresh = resolved.build(tower.hidden_size, first.shape[0]).state_dict()
    fuser = fuser_weights(fresh, PROJECTOR + "fuser.", first.dtype)
    steps = with_new_shard(checkpoint, fuser, link, from_released) + code()
    own = {"vision_feature_layer": list(resolved.layers), **fuser_config(resolved)}
    return notes + finish("upgrade", checkpoint, out, steps, checkpoint.config, link, own)


def export_to_llava(source: str, out: str, base: Optional[str] = None, vision_tower: Optional[str] = None) -> List[str]:
    """Write a folder in transformers' own format, with a fuser or without, as a checkpoint of LLaVA's.

    A projector that reads several layers side by side becomes the fusion ``channel_concat``. A tower that was not
    trained is left to ``mm_vision_tower``, as in LLaVA's own checkpoints.

    Args:
        source, out: folder to read, and folder to make.
        base: where to take tokenizer.model from, if `source` has none.
        vision_tower: the tower that the model was trained with, folder or name on the hub; None takes what `export`
            wrote down.

    Returns notes for the user, one per line.
    """
    check_out(source, out)
    checkpoint, config = _read(source, "export")
    kind = config["text_config"].get("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"text_config has model_type={kind!r}; LLaVA's format is written for LLaMA only")
    name = vision_tower or config.get(VISION_TOWER)
    if not isinstance(name, str):
        advice = "name the one that it was trained with, such as openai/clip-vit-large-patch14-336, by --vision-tower"
        raise ValueError(f"{source}/config.json does not say which vision tower it has; {advice}")
    words = source if "tokenizer.model" in checkpoint.others or base is None else local_folder(base, "--base")
    if not os.path.isfile(os.path.join(words, "tokenizer.model")):
        raise ValueError(f"{words} has no tokenizer.model; name a folder that has LLaVA's or Vicuna's by --base")
    weights, settings = _llava_weights(checkpoint, config)
    rows, files, notes = tokenizer.back(source, words, config["image_token_index"])
    for weight in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[weight] = _with_rows(source, weight, weights.get(weight), rows)
    tower = {name: tensor for name, tensor in weights.items() if name.startswith(TOWER_IN_LLAVA)}
    trained = not _same(tower, local_folder(name, "mm_vision_tower"))
    if not trained:
        weights = {name: tensor for name, tensor in weights.items() if name not in tower}
    llava = {
        **_llava_config(config, weights, settings),
        "mm_vision_tower": name,
        "unfreeze_mm_vision_tower": trained,
        "image_aspect_ratio": "pad" if _pads(checkpoint) else "square",
        "tokenizer_model_max_length": _json(checkpoint, "tokenizer_config.json").get("model_max_length"),
    }
    projector = {name.split(MARK)[1]: tensor for name, tensor in weights.items() if MARK in name}
    problem = misfit(llava, projector)
    if problem:
        raise ValueError(f"{source}: {problem}")
    refuse_nan(projector.values())
    start = {name: llava[name] for name in ("bos_token_id", "eos_token_id")}
    steps = [*writing.shards(weights), *files, writing.as_json("generation_config.json", start)]
    steps.append(writing.as_json("config.json", llava))
    writing.write_folder(source, out, steps, "export")
    problem = name_problem(name_from_path(out), FULL, llava)
    return [*notes, f"{out} is complete: {len(steps)} files", *([f"{NAME_NOTE}, and {problem}"] if problem else [])]


def _read(source: str, command: str) -> Tuple[Checkpoint, Dict[str, Any]]:
    """A folder in transformers' format, and what its config.json says, with transformers' defaults."""
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.NATIVE, command)
    config = {
        "text_config": {},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_token_index": checkpoint.config.get("image_token_id", 32000),
        **checkpoint.config,
    }
    layers, image = config["vision_feature_layer"], config["image_token_index"]
    strategy = config["vision_feature_select_strategy"]
    listed = layers if isinstance(layers, list) else [layers]
    for name, is_good, allowed in (
        ("text_config", isinstance(config["text_config"], dict), "an object"),
        ("vision_config", isinstance(config["vision_config"], dict), "an object"),
        ("image_token_index", type(image) is int and 0 <= image < 1 << 24, "a token's id"),
        ("vision_feature_select_strategy", strategy in list(_FEATURES), " or ".join(_FEATURES)),
        ("vision_feature_layer", {type(layer) for layer in listed} == {int}, "a whole number or a list of some"),
    ):
        if not is_good:
            raise ValueError(f"{name}={config[name]!r} in {source}/config.json is not allowed; use {allowed}")
    config["vision_config"] = {"num_hidden_layers": 24, **config["vision_config"]}
    check_count(config["vision_config"]["num_hidden_layers"], MAX_LAYERS, "num_hidden_layers of vision_config")
    return checkpoint, config


def _with_rows(source: str, name: str, weight: Optional[Weight], rows: List[int]) -> Weight:
    """The rows of an embedding that LLaVA has a token for."""
    if weight is None or len(weight.shape) != 2:
        raise ValueError(f"{source} has no {name}, so it is no whole model")
    there = [index for place, index in enumerate(rows) if index < weight.shape[0] or index != place]
    if there and there[-1] >= weight.shape[0]:
        raise ValueError(f"{source}: the tokenizer has a token {there[-1]}, but {name} only {weight.shape[0]} rows")
    return weight._replace(shape=(len(there), weight.shape[1]), read=lambda: weight.read()[there])


def _llava_config(
    config: Mapping[str, Any], weights: Mapping[str, Weight], settings: Optional[MMFuserConfig]
) -> Dict[str, Any]:
    """What a config.json in LLaVA's format says about the model and its projector."""
    layers, head = config["vision_feature_layer"], weights["lm_head.weight"]
    first = next(weights[name] for name in (f"model.{MARK}0.weight", f"model.{MARK}weight") if name in weights)
    return {
        **_text_config(config),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": head.dtype,
        "vocab_size": head.shape[0],
        "hidden_size": head.shape[1],
        "mm_hidden_size": first.shape[1],
        "mm_projector_type": "mlp2x_gelu" if settings is None else PROJECTOR_TYPE,
        "mm_vision_select_layer": layers if isinstance(layers, int) else layers[-1],
        "mm_vision_select_feature": _FEATURES[config["vision_feature_select_strategy"]],
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **({} if settings is None else settings.to_llava()),
    }


def _projector(checkpoint: Checkpoint) -> Tuple[Weight, Dict[str, Weight]]:
    """The weight of the projector's first layer, and all of the projector's, under their full names."""
    weights = float_weights(checkpoint.folder, checkpoint.shards)
    weights = {name: weight for name, weight in weights.items() if "multi_modal_projector." in name}
    for name, weight in weights.items():
        if name.endswith("multi_modal_projector.linear_1.weight") and len(weight.shape) == 2:
            return weight, weights
    raise ValueError(f"{checkpoint.folder} has no weights of a projector (multi_modal_projector.linear_1)")


def _llava_weights(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> Tuple[Dict[str, Weight], Optional[MMFuserConfig]]:
    """All weights under LLaVA's names, and the settings of the fuser, if there is one."""
    _projector(checkpoint)  # refuses a folder without one
    layers = config["vision_feature_layer"]
    linear = config.get(FLAG_PREFIX + "projector") == "linear"
    weights = {}
    for name, tensor in float_weights(checkpoint.folder, checkpoint.shards).items():
        there = to_llava(name, linear)
        if there is None:
            raise ValueError(f"{checkpoint.folder}: {name} is no weight of a LLaVA")
        weights[there] = tensor
    if isinstance(layers, int):
        return weights, None
    own = {name: value for name, value in config.items() if name.startswith(FLAG_PREFIX)}
    if not own:  # the first layer reads all maps side by side, the query last
        own[FLAG_PREFIX + "fusion"] = "channel_concat"
        first, prefix = weights["model.mm_projector.0.weight"], "model.mm_projector."
        out, width = first.shape[0], first.shape[1] // len(layers)
        extra = first._replace(shape=(out, first.shape[1] - width), read=lambda: first.read()[:, :-width])
        weights[prefix + "fuser.extra.weight"] = extra
        weights[prefix + "0.weight"] = first._replace(shape=(out, width), read=lambda: first.read()[:, -width:])
    settings = MMFuserConfig.from_llava({**own, "mm_fuser_layers": layers})
    blocks = config["vision_config"]["num_hidden_layers"]
    return weights, dataclasses.replace(settings, layers=settings.layers.resolve(blocks))


def _same(tower: Mapping[str, Weight], folder: str) -> bool:
    """Whether these weights are those of the tower in a folder, in their own dtype."""
    there = float_weights(folder, read_checkpoint(folder).shards)
    for name, tensor in tower.items():
        other = there.get(name[len(TOWER_IN_LLAVA) :])
        if other is None or other.shape != tensor.shape:
            raise ValueError(f"{folder} is another vision tower than the one that the model has: {name} does not fit")
        value = tensor.read()
        if not torch.equal(value, other.read().to(value.dtype)):
            return False
    return True


def _text_config(config: Mapping[str, Any]) -> Dict[str, Any]:
    """The language model's part of a config.json of LLaVA's, with the defaults that transformers left out."""
    from transformers import LlamaConfig

    text, default = config["text_config"], LlamaConfig()
    found = {name: text.get(name, getattr(default, name, None)) for name in LLAMA}
    rope = text.get("rope_parameters")  # as transformers 5 writes it
    if isinstance(rope, dict):
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "linear", "dynamic"):
            raise ValueError(f"text_config has rope_type={kind!r}; LLaVA's LLaMA knows default, linear, dynamic only")
        found["rope_theta"] = rope.get("rope_theta")
        found["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope.get("factor")}
    found["rope_theta"] = found["rope_theta"] or 10000.0
    return {name: value for name, value in found.items() if value is not None}


def _pads(checkpoint: Checkpoint) -> bool:
    """Whether pictures are padded to a square; the setting's place differs between versions."""
    image = _json(checkpoint, PREPROCESSOR) or _json(checkpoint, "processor_config.json")
    return bool({**image, **image.get("image_processor", {})}.get("do_pad"))


def _json(checkpoint: Checkpoint, name: str) -> Dict[str, Any]:
    return read_json(checkpoint.path(name)) if name in checkpoint.others else {}
