"""A LLaVA checkpoint with a fuser as a folder in transformers' own format."""

import glob
import math
import os
import re
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from ..block.fusion import Fusion
from ..checkpoints import writing
from ..checkpoints.convert import check_out
from ..checkpoints.files import Weight, float_weights, read_json, refuse_nan, weight_of
from ..checkpoints.folder import LORA, Checkpoint, read_checkpoint
from ..checkpoints.verdict import EXPORT, check_format, judge, misfit
from ..checkpoints.writing import Step
from ..config import FLAG_PREFIX, MMFuserConfig
from ..names import MARK, Format, without_wrapper
from ..towers import TOWERS, tower_config
from . import stock, tokenizer
from .card import model_card
from .names import PROJECTOR, TOWER_IN_LLAVA, to_native, to_released

CODE = "modeling_llava_mmfuser"
PREPROCESSOR = "preprocessor_config.json"
ARCHITECTURE = "LlavaMMFuserForConditionalGeneration"
VISION_TOWER = "llava_vision_tower"  # key of config.json: what LLaVA calls mm_vision_tower, for the way back
AUTO_MAP = {
    "AutoConfig": f"{CODE}.LlavaMMFuserConfig",
    "AutoModel": f"{CODE}.LlavaMMFuserModel",
    "AutoModelForImageTextToText": f"{CODE}.{ARCHITECTURE}",
    "AutoModelForCausalLM": f"{CODE}.{ARCHITECTURE}",  # by which LLaMA-Factory and ms-swift load
}
LLAMA = (  # what config.json says about the language model; LLaVA has it among its own settings
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "mlp_bias", "bos_token_id", "eos_token_id"),
)
CLIP = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
)


def export(source: str, out: str, base: Optional[str] = None, plain: Optional[bool] = None) -> List[str]:
    """Write a LLaVA checkpoint with a fuser in transformers' own format.

    Args:
        source, out: folder of a full checkpoint, an adapter or a LoRA in this package's format, and folder to make.
        base: the language model of an adapter or LoRA: a folder, or a name on the hub.
        plain: write transformers' own LLaVA, which needs no code, where its projector can say the same. None does so
            for the linear fusions whose result it has exactly, and never for a fuser that could still be trained.

    Returns notes for the user, one per line.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.OURS, "export")
    config = writing.without_pointers(checkpoint.config)
    _check_expressible(config)
    language = _language_model(checkpoint, base)
    tower = local_folder(str(config.get("mm_vision_tower")), "mm_vision_tower")
    vision = tower_config(tower)
    if vision.kind != "CLIP":
        raise ValueError(f"mm_vision_tower={tower!r} is a {vision.kind} tower, but only CLIP towers can be exported")
    settings = judge(checkpoint, EXPORT, vision).check().resolve(vision)
    weights = _weights(checkpoint, language, tower)
    fuser = _fuser(settings, config, weights)
    weights = {to_native(name): tensor for name, tensor in weights.items()}
    blocks, notes = _stock(plain, settings, config, fuser, weights[PROJECTOR + "linear_1.weight"])
    if blocks is not None:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PROJECTOR + "fuser.")}
        weights[PROJECTOR + "linear_1.weight"] = weight_of("linear_1", torch.cat(list(blocks.values()), dim=1))
    image, pad, files = tokenizer.read(source if checkpoint.shards else language.folder, config)
    rows = math.ceil((image + 2) / 64) * 64  # LLaVA's tokens, <image> and <pad>
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = _with_rows(weights[name], image, rows)
    layers = list(settings.layers if blocks is None else blocks)
    clip = TOWERS["CLIP"].transformers_class("VisionConfig").from_pretrained(tower)
    native = {
        **_native_config(config, clip, settings, fuser, layers, blocks is not None),
        "torch_dtype": weights["lm_head.weight"].dtype,
        "image_token_index": image,
        "pad_token_id": pad,
    }
    native["text_config"].update(vocab_size=rows, pad_token_id=pad, torch_dtype=native["torch_dtype"])
    preprocessor = read_json(os.path.join(tower, PREPROCESSOR))
    files += _processor(config, native, preprocessor)
    read = {"config.json": checkpoint.config, f"{tower}/{PREPROCESSOR}": preprocessor}
    notes += writing.code_note([f"auto_map in {n}" for n, c in read.items() if c != writing.without_pointers(c)])
    files += code() if blocks is None else []
    name = base or str(config.get("_name_or_path"))
    files.append(writing.text("README.md", model_card(out, name, config, settings, fuser, blocks is not None)))
    files += writing.shards(weights if blocks is None else {to_released(name): t for name, t in weights.items()})
    files.append(writing.as_json("config.json", native))
    writing.write_folder(source, out, files, "export")
    return notes + [f"{out} is complete: {len(files)} files"]


def _check_expressible(config: Mapping[str, Any]) -> None:
    """Refuse what LLaVA has and transformers' LLaVA, or a fuser, has not."""
    kind = config.get("model_type")
    if kind not in ("llava_llama", "llava"):
        raise ValueError(f"model_type={kind!r} in config.json is not supported; only LLaVA on LLaMA or Vicuna is")
    known: Dict[str, List[Any]] = {"mm_use_im_start_end": [False], "mm_patch_merge_type": ["flat"]}
    for name, allowed in {**known, "image_aspect_ratio": ["pad", "square", None]}.items():
        if config.get(name, allowed[0]) not in allowed:
            what = f"{name}={config[name]!r} in config.json cannot be said to transformers' LLaVA"
            raise ValueError(f"{what}; allowed is {' or '.join(map(repr, allowed))}")


def _language_model(checkpoint: Checkpoint, base: Optional[str]) -> Checkpoint:
    """The folder with the language model's weights."""
    if checkpoint.shards:
        if base is not None:
            raise ValueError(f"{checkpoint.folder} is a full checkpoint, which needs no base; drop --base {base}")
        return checkpoint
    if base is None:
        advice = "name the one that it was trained with, a folder or a name on the hub, by --base"
        raise ValueError(f"{checkpoint.folder} has no language model; {advice}")
    found = read_checkpoint(local_folder(base, "--base"))
    for name in ("hidden_size", "num_hidden_layers"):
        there, wanted = found.config.get(name), checkpoint.config.get(name)
        if there != wanted:
            what = f"--base {base} has {name}={there!r}, but {checkpoint.folder} was trained with a language model of"
            raise ValueError(f"{what} {wanted!r}; name that one")
    return found


def local_folder(name: str, setting: str) -> str:
    """A folder, or the local copy of a model on the hub, which is downloaded if need be."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "tokenizer.model"])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{setting}={name!r} is no folder on this machine, nor on the hub: {reason}") from error


def _weights(checkpoint: Checkpoint, language: Checkpoint, tower: str) -> Dict[str, Weight]:
    """All weights that LLaVA would load, under its names: those of the language model, changed by a LoRA, then what was
    trained beside it, and the tower's."""
    weights = float_weights(language.folder, language.shards)
    lora = [file for file in LORA if file in checkpoint.others][:1] if not checkpoint.shards else []
    trained = float_weights(checkpoint.folder, lora + ([] if checkpoint.shards else checkpoint.adapters))
    trained = {re.sub(r"^(base_model\.)?(model\.(?=model\.|lm_head\.))?", "", n): t for n, t in trained.items()}
    without_wrapper(trained, "model." + MARK)
    if lora:
        trained = {**_merged(checkpoint, weights, trained), **trained}
    for name, tensor in trained.items():
        of_tower = name.startswith(TOWER_IN_LLAVA)  # whose biases PEFT saves with --lora_bias all, trained or not
        if re.search(r"\.lora_[AB]\.", name) or (of_tower and not checkpoint.config.get("unfreeze_mm_vision_tower")):
            continue
        if MARK not in name and not of_tower and (name not in weights or weights[name].shape != tensor.shape):
            raise ValueError(f"{checkpoint.folder}: {name} {list(tensor.shape)} is no weight of {language.folder}")
        weights[name] = tensor
    if not checkpoint.config.get("unfreeze_mm_vision_tower"):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(TOWER_IN_LLAVA)}
    if not any(name.startswith(TOWER_IN_LLAVA) for name in weights):
        found = float_weights(tower, read_checkpoint(tower).shards)
        found = {TOWER_IN_LLAVA + name: tensor for name, tensor in found.items() if name.startswith("vision_model.")}
        if not found:
            raise ValueError(f"mm_vision_tower={tower!r} has no weights of a CLIP vision tower")
        weights.update(found)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in weights:
            raise ValueError(f"{language.folder} has no {name}, so it is no whole language model")
    return weights


def _merged(checkpoint: Checkpoint, weights: Mapping[str, Weight], trained: Mapping[str, Weight]) -> Dict[str, Weight]:
    """The weights that a LoRA changes, merged one at a time when they are written."""
    config = read_json(checkpoint.path("adapter_config.json"))
    unknown = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if config.get(name)]
    if unknown:
        what = f"{checkpoint.folder}/adapter_config.json has {unknown[0]}={config[unknown[0]]!r}, which only PEFT can"
        run = f"python scripts/merge_lora_weights.py --model-path {checkpoint.folder} --model-base BASE"
        raise ValueError(f"{what} merge; in LLaVA's checkout run: {run} --save-model-path MERGED, and export MERGED")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    merged = {}
    for name, down in trained.items():
        target, mark, rest = name.partition(".lora_A.")
        if mark:
            if target + ".weight" not in weights:
                raise ValueError(f"{checkpoint.folder}: the LoRA changes {target}, which the base does not have")
            before, up = weights[target + ".weight"], trained[f"{target}.lora_B.{rest}"]
            merged[target + ".weight"] = before._replace(read=partial(_merge, before, down, up, scale))
    return merged


def _merge(weight: Weight, down: Weight, up: Weight, scale: float) -> torch.Tensor:
    """As PEFT merges on a CPU, rounding included."""
    before = weight.read()
    return before + (up.read().float() @ down.read().float() * scale).to(before.dtype)


def _fuser(settings: MMFuserConfig, config: Mapping[str, Any], weights: Mapping[str, Weight]) -> Fusion:
    """The fuser with the checkpoint's weights; refuses those of a projector that do not fit or are not finite."""
    projector = {name.split(MARK)[1]: weight for name, weight in weights.items() if MARK in name}
    problem = misfit(config, projector)
    if problem:
        raise ValueError(problem)
    refuse_nan(projector.values())
    fuser = settings.build(config["mm_hidden_size"], config["hidden_size"])
    state = {name[len("fuser.") :]: t.read() for name, t in projector.items() if name.startswith("fuser.")}
    if len(state) < len(list(fuser.parameters())):
        raise ValueError("the checkpoint has no weights of its fuser; upgrade puts a fresh one into a released LLaVA")
    fuser.load_state_dict(state)
    return fuser


def _stock(
    plain: Optional[bool], settings: MMFuserConfig, config: Mapping[str, Any], fuser: Fusion, weight: Weight
) -> Tuple[Optional[Dict[int, torch.Tensor]], List[str]]:
    """`stock.first_layer` in the weight's dtype if the folder is to be transformers' own LLaVA, else None; notes."""
    exact, fusion = None, settings.fusion
    without_cls = config.get("mm_vision_select_feature", "patch") == "patch"  # the query's CLS passes unfused
    if settings.projector == "mlp2x_gelu" and (without_cls or fuser.is_identity()):
        exact = stock.first_layer(fusion, fuser, settings.layers, weight.read())
    if exact is None and plain:
        can = "only linear fusions of patches, and fusers with shut gates, in front of mlp2x_gelu; drop --stock"
        raise ValueError(f"{settings.summary()}, {settings.projector}: transformers' own LLaVA can say {can}")
    if exact is None or plain is False:
        return None, []
    blocks = {layer: block.to(getattr(torch, weight.dtype)) for layer, block in exact.items()}
    same = all(torch.equal(blocks[layer].double(), block) for layer, block in exact.items())
    if plain:
        return blocks, [] if same else [f"folding rounds to {weight.dtype}"]
    if fusion == "mmfuser":
        return None, ["the gates are shut; --stock writes plain LLaVA, without code or a fuser to train"]
    if not same:
        return None, [f"{fusion} is linear; --stock folds it into plain LLaVA, rounded to {weight.dtype}"]
    return blocks, [f"{fusion} is linear, so the result is plain LLaVA, which needs no code"]


def _with_rows(weight: Weight, own: int, rows: int) -> Weight:
    """The first `own` rows and others that are their mean: as a logit it is never the largest."""

    def read() -> torch.Tensor:
        old = weight.read()[:own]
        mean = old.float().mean(0, keepdim=True).to(old.dtype)
        return torch.cat([old, mean.expand(rows - len(old), -1)])

    return weight._replace(shape=(rows, *weight.shape[1:]), read=read)


def _native_config(
    config: Mapping[str, Any], vision: Any, settings: MMFuserConfig, fuser: Fusion, layers: Sequence[int], plain: bool
) -> Dict[str, Any]:
    """The config.json of transformers' format, but for what the tokenizer adds to it."""
    strategy = {"patch": "default", "cls_patch": "full"}[config.get("mm_vision_select_feature", "patch")]
    patches = (vision.image_size // vision.patch_size) ** 2
    native = {
        "architectures": ["LlavaForConditionalGeneration" if plain else ARCHITECTURE],
        "model_type": "llava",
        "image_seq_length": fuser.num_tokens(patches) + (strategy == "full"),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": strategy,
        VISION_TOWER: config["mm_vision_tower"],
        "text_config": {"model_type": "llama", **{name: config[name] for name in LLAMA if name in config}},
        "vision_config": {"model_type": "clip_vision_model", **{name: getattr(vision, name) for name in CLIP}},
    }
    return native if plain else {**native, **fuser_config(settings)}


def fuser_config(settings: MMFuserConfig) -> Dict[str, Any]:
    """What a config.json of transformers' format says about the fuser, and where its code is."""
    own = {name: value for name, value in settings.to_llava().items() if name != FLAG_PREFIX + "layers"}
    return {"architectures": [ARCHITECTURE], "auto_map": AUTO_MAP, **own}


def code() -> List[Step]:
    """The files of code in a folder: the block as it is, and the model, which finds it beside itself there."""
    here = os.path.dirname(os.path.abspath(__file__))
    block = sorted(glob.glob(os.path.join(os.path.dirname(here), "block", "[a-z]*.py")))
    steps = [writing.unchanged(path, os.path.basename(path), link=False) for path in block]
    with open(os.path.join(here, CODE + ".py"), encoding="utf-8") as stream:
        model = stream.read().replace("from ..block.", "from .")
    model += "\n\nif TYPE_CHECKING:  # transformers 4 copies to its cache only what this very file imports\n"
    model += "".join(f"    from .{step.name[:-3]} import *  # noqa: F403\n" for step in steps)
    return steps + [writing.text(CODE + ".py", model)]


def _processor(config: Mapping[str, Any], native: Mapping[str, Any], preprocessor: Any) -> List[Step]:
    """How pictures and prompts become what LLaVA makes of them."""
    image = writing.without_pointers(preprocessor)
    image.pop("feature_extractor_type", None)
    for name, sides in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
        if isinstance(image.get(name), int):  # as OpenAI's own folder has it
            image[name] = dict.fromkeys(sides, image[name])
    pad = config.get("image_aspect_ratio") == "pad"
    image.update({"image_processor_type": "LlavaImageProcessor", "do_pad": True} if pad else {})
    image.update({"processor_class": "LlavaProcessor"} if pad else {"image_processor_type": "CLIPImageProcessor"})
    vision, strategy = native["vision_config"], native["vision_feature_select_strategy"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": native["image_seq_length"] - patches + (strategy == "default"),  # CLS counts
        "vision_feature_select_strategy": strategy,
    }
    tokens = {name: native["text_config"].get(name) for name in ("bos_token_id", "eos_token_id")}
    return [
        writing.as_json(PREPROCESSOR, image),
        writing.as_json("processor_config.json", processor),
        writing.as_json("generation_config.json", {**tokens, "pad_token_id": native["pad_token_id"]}),
        writing.text("chat_template.jinja", tokenizer.CHAT_TEMPLATE),
    ]
