"""What starts from a folder in transformers' own format: putting a fuser into it, and the way back to LLaVA's."""

import dataclasses
import json
import os
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch

from ..block.kinds import MAX_LAYERS, MAX_WIDTH, check_count
from ..checkpoints import writing
from ..checkpoints.convert import check_format, check_out, finish, may_link, upgrade_settings, with_new_shard
from ..checkpoints.files import DTYPES, Weight
from ..checkpoints.fit import misfit
from ..checkpoints.folder import FULL, Checkpoint, name_from_path, name_problem, read_checkpoint
from ..checkpoints.report import NAME_NOTE
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig
from ..names import MARK, Format
from ..towers import TowerConfig, kind_of
from . import tensors
from .folder import LLAMA, VISION_TOWER, code, fuser_config, json_file, local_folder
from .names import TOWER_IN_LLAVA, to_llava
from .tensors import Tensor

_FEATURES = {"default": "patch", "full": "cls_patch"}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "padding_side": "right"}


def upgrade(source: str, out: str, link: bool = False, settings: Optional[Mapping[str, Any]] = None) -> List[str]:
    """Put a fresh fuser in front of the projector of a LLaVA in transformers' own format, such as ``llava-hf``'s.

    The result is in the same format, with the fuser's code in it, and answers bit for bit as the input.

    Args:
        source, out, link, settings: as of `convert.upgrade`.

    Returns:
        Notes for the user, one per line.

    Raises:
        ValueError: as `convert.upgrade`; a folder that fuses several layers already; another tower than CLIP.
        OSError: reading or writing fails.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.NATIVE, "upgrade")
    config, first = checkpoint.config, _first_layer(checkpoint)
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer!r} in {source}/config.json: it fuses several layers already")
    vision = config["vision_config"]
    if kind_of(vision.get("model_type")) != "CLIP":
        raise ValueError(f"vision_config has model_type={vision.get('model_type')!r}; only CLIP towers are supported")
    tower = TowerConfig("CLIP", first.shape[1], vision.get("num_hidden_layers", 24), num_deleted=0)
    check_count(tower.hidden_size, MAX_WIDTH, "hidden_size of the vision tower")
    check_count(tower.num_hidden_layers, MAX_LAYERS, "num_hidden_layers of the vision tower")
    known = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": layer}
    resolved, _ = upgrade_settings(known, dict(settings or {}), "vision_config", tower)
    fresh = resolved.build(tower.hidden_size, first.shape[0]).state_dict()
    prefix = first.name[: -len("linear_1.weight")] + "fuser."
    fuser = {prefix + name: value.to(getattr(torch, first.dtype)) for name, value in fresh.items()}
    link, notes = may_link(link, source, out)
    steps = with_new_shard(checkpoint, fuser, link) + code()
    own = {"vision_feature_layer": list(resolved.layers), **fuser_config(resolved)}
    return notes + finish("upgrade", checkpoint, out, steps, config, link, own)


def export_to_llava(source: str, out: str, base: Optional[str] = None, vision_tower: Optional[str] = None) -> List[str]:
    """Write a folder in transformers' own format, with a fuser or without, as a checkpoint of LLaVA's.

    A projector that reads several layers side by side becomes the fusion ``channel_concat``. A tower that was not
    trained is left to ``mm_vision_tower``, as in LLaVA's own checkpoints.

    Args:
        source: folder to read.
        out: folder to make.
        base: where to take tokenizer.model from, if `source` has none.
        vision_tower: the tower that the model was trained with, folder or name on the hub; None takes what `export`
            wrote down.

    Returns:
        Notes for the user, one per line.

    Raises:
        ValueError: no such folder, another language model than LLaMA, a tower or tokenizer that is not there.
        OSError: reading or writing fails.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.NATIVE, "export")
    config = checkpoint.config
    text = config.get("text_config") or {}
    if text.get("model_type", "llama") != "llama":
        raise ValueError(f"text_config has model_type={text['model_type']!r}; LLaVA's format is written for LLaMA only")
    name = vision_tower or config.get(VISION_TOWER)
    if not isinstance(name, str):
        raise ValueError(
            f"{source}/config.json does not say which vision tower it has; name the one that it was trained with, "
            f"such as openai/clip-vit-large-patch14-336, by --vision-tower"
        )
    weights, settings = _llava_weights(checkpoint)
    own = config.get("image_token_index", config.get("image_token_id", 32000))  # LLaVA's own tokens come before it
    for weight in ("model.embed_tokens.weight", "lm_head.weight"):
        if weight not in weights:
            raise ValueError(f"{source} has no {weight}, so it is no whole model")
        before = weights[weight]
        shape = (min(own, before.shape[0]), before.shape[1])
        weights[weight] = before._replace(shape=shape, read=partial(_rows, before, own))
    tower = {name: tensor for name, tensor in weights.items() if name.startswith(TOWER_IN_LLAVA)}
    trained = not _same(tower, local_folder(name, "mm_vision_tower"))
    if not trained:
        weights = {name: tensor for name, tensor in weights.items() if name not in tower}
    words = source if "tokenizer.model" in checkpoint.others or base is None else local_folder(base, "--base")
    if not os.path.isfile(os.path.join(words, "tokenizer.model")):
        raise ValueError(f"{words} has no tokenizer.model; name a folder that has LLaVA's or Vicuna's by --base")
    projector = {name.split(MARK)[1]: tensor for name, tensor in weights.items() if MARK in name}
    layers = config.get("vision_feature_layer", -2)
    length = _json(checkpoint, "tokenizer_config.json").get("model_max_length")
    llava = {
        **_text_config(config),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": weights["lm_head.weight"].dtype,
        "vocab_size": weights["lm_head.weight"].shape[0],
        "hidden_size": weights["lm_head.weight"].shape[1],
        "mm_hidden_size": next(projector[name] for name in ("0.weight", "weight") if name in projector).shape[1],
        "mm_projector_type": "mlp2x_gelu" if settings is None else PROJECTOR_TYPE,
        "mm_vision_tower": name,
        "mm_vision_select_layer": layers if isinstance(layers, int) else layers[-1],
        "mm_vision_select_feature": _FEATURES[config.get("vision_feature_select_strategy", "default")],
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad" if _pads(checkpoint) else "square",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": trained,
        "tokenizer_model_max_length": length,
        **({} if settings is None else settings.to_llava()),
    }
    problem = misfit(llava, tensors.headers(projector))
    if problem:
        raise ValueError(f"{source}: {problem}")
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "model_max_length": length, **_TOKENS}
    steps = tensors.steps(weights) + [
        writing.unchanged(os.path.join(words, "tokenizer.model"), "tokenizer.model", link=False),
        json_file("tokenizer_config.json", tokenizer),
        json_file("generation_config.json", {name: llava[name] for name in ("bos_token_id", "eos_token_id")}),
        json_file("config.json", llava),
    ]
    writing.write_folder(source, out, steps, "export")
    problem = name_problem(name_from_path(out), FULL, llava)
    return [f"{out} is complete: {len(steps)} files", *([f"{NAME_NOTE}, and {problem}"] if problem else [])]


def _first_layer(checkpoint: Checkpoint) -> Weight:
    """The weight of the projector's first layer."""
    for weights in checkpoint.weights.values():
        for weight in weights:
            if weight.name.endswith("multi_modal_projector.linear_1.weight"):
                if weight.dtype not in DTYPES.values():
                    raise ValueError(f"{weight.file}: {weight.name} is {weight.dtype}; only floating point is allowed")
                return weight
    raise ValueError(f"{checkpoint.folder} has no weights of a projector (multi_modal_projector.linear_1)")


def _llava_weights(checkpoint: Checkpoint) -> Tuple[Dict[str, Tensor], Optional[MMFuserConfig]]:
    """All weights under LLaVA's names, and the settings of the fuser, if there is one."""
    config = checkpoint.config
    _first_layer(checkpoint)  # refuses a folder without a projector
    layers = config.get("vision_feature_layer", -2)
    linear = config.get(FLAG_PREFIX + "projector") == "linear"
    weights = {}
    for name, tensor in tensors.of_files(checkpoint.folder, checkpoint.shards).items():
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
    blocks = config["vision_config"].get("num_hidden_layers", 24)
    return weights, dataclasses.replace(settings, layers=settings.layers.resolve(blocks))


def _rows(weight: Tensor, count: int) -> torch.Tensor:
    return weight.read()[:count]


def _same(tower: Mapping[str, Tensor], folder: str) -> bool:
    """Whether these weights are those of the tower in a folder, in their own dtype."""
    there = tensors.of_files(folder, read_checkpoint(folder).shards)
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

    text, default = config.get("text_config") or {}, LlamaConfig()
    found = {name: text.get(name, getattr(default, name, None)) for name in LLAMA}
    rope = text.get("rope_parameters")  # as transformers 5 writes it
    if rope:
        kind = rope.get("rope_type", "default")
        found["rope_theta"] = rope["rope_theta"]
        found["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope.get("factor")}
    found["rope_theta"] = found["rope_theta"] or 10000.0
    return {name: value for name, value in found.items() if value is not None}


def _pads(checkpoint: Checkpoint) -> bool:
    """Whether pictures are padded to a square; the setting's place differs between versions."""
    image = _json(checkpoint, "preprocessor_config.json") or _json(checkpoint, "processor_config.json")
    return bool({**image, **image.get("image_processor", {})}.get("do_pad"))


def _json(checkpoint: Checkpoint, name: str) -> Dict[str, Any]:
    if name not in checkpoint.others:
        return {}
    with open(checkpoint.path(name), encoding="utf-8") as stream:
        return json.load(stream)
