"""What a checkpoint folder holds: reading its config, index and the names of its weights, and `inspect`.

Files are read as transformers and LLaVA would: safetensors before ``.bin``, one file before shards, then adapters. Only
headers are read; a ``.bin`` is memory-mapped. Nothing here writes or downloads.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import zipfile
from types import SimpleNamespace
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from .block.kinds import ATTENTION_KINDS, FUSIONS, MAX_LAYERS, MAX_WIDTH, check_count
from .checkpoint import (
    MARK,
    Shapes,
    compare,
    convert_hint,
    describe,
    differences,
    expected_shapes,
    from_published,
    is_authors_config,
    is_published,
    read_config,
    read_tensors,
    to_published,
    without_wrapper,
)
from .config import (
    CLIP_TYPES,
    FLAG_PREFIX,
    PROJECTOR_TYPE,
    MMFuserConfig,
    check_order,
    check_tower,
    layers_setting,
    parse_layers,
    spell,
)
from .towers import SELECT_FEATURES

_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTERS = ("mm_projector.bin", "non_lora_trainables.bin")
MODEL = "the model"
LORA = ("adapter_model.safetensors", "adapter_model.bin")
_LEFT_OUT = re.compile(
    r"(model|pytorch_model)(-.*)?\.(safetensors|bin)(\.index\.json)?|(tf|flax)_model.*|(optimizer|scheduler|rng_state).*"
)
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


FULL, LORA_FOLDER, ADAPTER_FOLDER = "a full checkpoint", "a LoRA folder", "an adapter folder"
NAME_NOTE = "note: LLaVA goes by the name"
MIXED = "a LoRA folder with a full checkpoint in it"


class Weight(NamedTuple):
    """Where one tensor lies (file in the checkpoint's folder, full name), with its dtype and shape."""

    file: str
    name: str
    dtype: str
    shape: Tuple[int, ...]


class Checkpoint(NamedTuple):
    """A folder as transformers and LLaVA would read it."""

    folder: str
    config: Dict[str, Any]
    shards: List[str]  # the whole model's files, in loading order; none in an adapter or LoRA folder
    index: Optional[Dict[str, Any]]
    adapters: List[str]  # other files that may hold the projector
    weights: Dict[str, List[Weight]]  # of every file in shards and adapters
    others: List[str]  # copied as they are
    left_out: List[str]

    def path(self, file: str) -> str:
        """Where a file of the folder lies."""
        return os.path.join(self.folder, file)

    def projectors(self) -> Dict[str, Dict[str, Weight]]:
        """For the model and for each adapter that has any: weights by their name behind ``mm_projector.``."""
        sources = {MODEL: self.shards, **{file: [file] for file in self.adapters}}
        found = {
            label: projector_weights(w for f in files for w in self.weights[f]) for label, files in sources.items()
        }
        return {label: weights for label, weights in found.items() if weights}

    def format(self) -> str:
        """``ours``, ``authors``, ``llava`` (no fuser) or ``other``."""
        if self.config.get("mm_projector_type") == PROJECTOR_TYPE:
            return "ours"
        if is_authors_config(self.config) or any(map(is_published, self.projectors().values())):
            return "authors"
        return "llava" if {"mm_vision_tower", "mm_projector_type"} & set(self.config) else "other"


def read_checkpoint(folder: str) -> Checkpoint:
    """Read the config, the index and the names, dtypes and shapes of all weights of a checkpoint folder.

    Raises:
        ValueError: no folder, no or bad config.json or index, a shard that is absent, a weight file that is truncated,
            of another format or holds other Python objects, an index that contradicts its shards, or no weights.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; name the folder of a checkpoint that is on this machine")
    config = read_config(folder)
    if config is None:
        raise ValueError(
            f"{folder} has no config.json; name the folder in which LLaVA saved the weights and config.json"
        )
    entries = sorted(os.listdir(folder))
    files = [name for name in entries if os.path.isfile(os.path.join(folder, name))]
    unreadable = [name for name in files if not os.access(os.path.join(folder, name), os.R_OK)]
    if unreadable:
        raise ValueError(f"{os.path.join(folder, unreadable[0])} cannot be read; check its permissions")
    model = next((name for name in _MODELS if name in files), None)
    index, shards = None, [model] if model else []
    if model and model.endswith(".json"):
        index, shards = _read_index(folder, model)
    adapters = [name for name in _ADAPTERS if name in files]
    if not shards and not adapters:
        raise ValueError(f"{folder} has no weights; looked for {', '.join(_MODELS + _ADAPTERS)}")
    if "adapter_config.json" in files and not set(LORA) & set(files):
        raise ValueError(f"{folder} has an adapter_config.json, but neither {' nor '.join(LORA)}; copy it again")
    weights = {file: read_weights(folder, file) for file in shards + adapters}
    for file in shards if index else []:
        listed = {name for name, shard in index["weight_map"].items() if shard == file}
        differing = sorted(listed ^ {weight.name for weight in weights[file]})
        if differing:
            raise ValueError(
                f"{os.path.join(folder, model)} and {file} disagree about {', '.join(differing[:3])} "
                f"({len(differing)} tensors); the files belong to different checkpoints, so copy them again"
            )
    used = {*shards, *adapters, model, "config.json"}
    left_out = [name for name in files if name not in used and _LEFT_OUT.fullmatch(name)]
    others = [name for name in files if name not in used and name not in left_out]
    folders = [name + "/" for name in entries if os.path.isdir(os.path.join(folder, name))]
    return Checkpoint(folder, config, shards, index, adapters, weights, others, left_out + folders)


def _read_index(folder: str, name: str) -> Tuple[Dict[str, Any], List[str]]:
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as stream:
        try:
            index = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(index, dict) or not all(isinstance(index.get(key), dict) for key in ("metadata", "weight_map")):
        raise ValueError(f"{path} is not an index of shards: it needs the objects 'metadata' and 'weight_map'")
    shards = sorted({str(shard) for shard in index["weight_map"].values()})
    for shard in shards:
        if os.path.basename(shard) != shard or not shard.endswith((".safetensors", ".bin")):
            raise ValueError(f"{path} names the shard {shard!r}; only weight files in the same folder are allowed")
        if not os.path.isfile(os.path.join(folder, shard)):
            raise ValueError(f"{path} names the shard {shard}, which is not there; download or copy it again")
    return index, shards


def read_weights(folder: str, file: str) -> List[Weight]:
    """Names, dtypes and shapes of the tensors in a safetensors or ``.bin`` file, in its order.

    Raises:
        ValueError: see `read_header` and `load_bin`.
    """
    path = os.path.join(folder, file)
    if file.endswith(".safetensors"):
        entries = [(name, entry) for name, entry in read_header(path)[0].items() if name != "__metadata__"]
        return [Weight(file, name, DTYPES.get(e["dtype"], e["dtype"]), tuple(e["shape"])) for name, e in entries]
    state = load_bin(path)
    return [Weight(file, name, str(t.dtype).replace("torch.", ""), tuple(t.shape)) for name, t in state.items()]


def read_header(path: str) -> Tuple[Dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data begin, in bytes.

    Raises:
        ValueError: not a safetensors file, or one whose length is not what its header says.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if size < 8 or length > size - 8:
                raise ValueError(f"its header would take {length} bytes")
            header = json.loads(stream.read(length).decode("utf-8"))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max([entry["data_offsets"][1] for entry in entries], default=0)
            if not all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in entries):
                raise ValueError("its header has other entries than tensors")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{path} ({size} bytes) is not a complete safetensors file: {error}; download or copy it again"
            ) from error
    if end != size:
        raise ValueError(
            f"{path} has {size} bytes, but its header says {end}: it is truncated or damaged; download or copy it again"
        )
    return header, 8 + length


def load_bin(path: str) -> Dict[str, torch.Tensor]:
    """As `read_tensors`, memory-mapped where the file's format allows."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(Exception):  # `read_tensors` finds the same fault, and says what to do
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values()):
                return state
    return read_tensors(path)


def tower_config(name: str, local_files_only: bool = False) -> Any:
    """The `CLIPVisionConfig` of a vision tower (folder or name on the hub); its weights are not read.

    Raises:
        ValueError: it cannot be found, or is no CLIP tower.
    """
    from transformers import CLIPVisionConfig, PretrainedConfig

    try:
        kind = PretrainedConfig.get_config_dict(name, local_files_only=local_files_only)[0].get("model_type")
        if kind in CLIP_TYPES:
            config = CLIPVisionConfig.from_pretrained(name, local_files_only=local_files_only)
            check_count(config.hidden_size, MAX_WIDTH, f"vision_tower={name!r}: hidden_size")
            check_count(config.num_hidden_layers, MAX_LAYERS, f"vision_tower={name!r}: num_hidden_layers")
            return config
    except (OSError, TypeError, AttributeError) as error:  # the last two of JSON that is no object
        reason = str(error).splitlines()[0]
        raise ValueError(f"the config of the vision tower {name!r} cannot be read: {reason}") from error
    raise ValueError(
        f"vision_tower={name!r} has model_type={kind!r}, but mm_projector_type={PROJECTOR_TYPE} needs a CLIP tower, "
        f"such as openai/clip-vit-large-patch14-336"
    )


def check_features(source: Any) -> None:
    """Refuse a config or `ModelArguments` under which the vision tower returns what a fuser cannot read.

    Raises:
        ValueError: ``s2``, or a ``mm_vision_select_feature`` other than `SELECT_FEATURES`.
    """
    if getattr(source, "s2", False):
        raise ValueError(f"s2=True together with mm_projector_type={PROJECTOR_TYPE} is not supported; set s2 to False")
    select_feature = getattr(source, "mm_vision_select_feature", SELECT_FEATURES[0])
    if select_feature not in SELECT_FEATURES:
        allowed = " or ".join(SELECT_FEATURES)
        raise ValueError(f"mm_vision_select_feature={select_feature!r} is not allowed; use {allowed}")


def projector_shapes(config: Mapping[str, Any], settings: MMFuserConfig) -> Shapes:
    """`expected_shapes` with the widths in a config.json.

    Raises:
        ValueError: the config lacks a width, or has one that the heads do not divide.
    """
    for name in ("mm_hidden_size", "hidden_size"):
        check_count(config.get(name), MAX_WIDTH, f"config.json: {name}")
    return expected_shapes(settings, config["mm_hidden_size"], config["hidden_size"])


def local_tower(config: Mapping[str, Any]) -> Optional[Any]:
    """The config of a checkpoint's vision tower, or None where it is not on this machine."""
    try:
        return tower_config(str(config.get("mm_vision_tower")), local_files_only=True)
    except ValueError:
        return None


def check_tower_is_there(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose vision tower LLaVA would neither find on this machine nor look for on the hub.

    Raises:
        ValueError: a folder without a CLIP tower's config, or no folder and no name that `build_vision_tower` knows.
    """
    name = str(config.get("mm_vision_tower"))
    if os.path.exists(name):
        tower_config(name, local_files_only=True)
    elif not name.startswith(("openai", "laion")) and "ShareGPT4V" not in name:
        relative = "" if os.path.isabs(name) else f" (seen from {os.getcwd()})"
        raise ValueError(
            f"mm_vision_tower={name!r} in config.json is no folder on this machine{relative}, and LLaVA does not look "
            f"for it on the hub; write where the vision tower is"
        )


def settings_of(config: Mapping[str, Any]) -> MMFuserConfig:
    """The fuser's settings in a config.json of any format; of plain LLaVA only the projector means something.

    Raises:
        ValueError: a setting that is not allowed.
    """
    if config.get("mm_projector_type") == PROJECTOR_TYPE:
        return MMFuserConfig.from_llava(config)
    projector = config.get("mm_projector_type", "linear")
    if is_authors_config(config):
        return MMFuserConfig(layers=parse_layers(config["mm_vision_select_layer"]), projector=projector)
    return MMFuserConfig(projector=projector)


def folder_kind(folder: str) -> str:
    """`FULL`, `LORA_FOLDER`, `ADAPTER_FOLDER`, or `MIXED`, which transformers reads as the LoRA that it is, too."""
    full = any(os.path.isfile(os.path.join(folder, name)) for name in _MODELS)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return MIXED if full else LORA_FOLDER
    has_adapter = any(os.path.isfile(os.path.join(folder, name)) for name in _ADAPTERS)
    return ADAPTER_FOLDER if has_adapter and not full else FULL


def name_problem(name: str, kind: str, config: Mapping[str, Any]) -> Optional[str]:
    """What is wrong with the model_name that `load_pretrained_model` goes by; None if nothing.

    Args:
        name: what LLaVA's `get_model_name_from_path` makes of a path, or what is passed.
        kind: see `folder_kind`.
        config: its config.json.
    """
    is_lora = kind in (LORA_FOLDER, MIXED)
    wanted = ["llava"] + (["lora"] if is_lora else [])
    unwanted = ["lora"] if kind == ADAPTER_FOLDER else []
    if not is_lora and "mpt" not in str(config.get("model_type")):
        unwanted.append("mpt")
    missing = [word for word in wanted if word not in name.lower()]
    present = [word for word in unwanted if word in name.lower()]
    if not missing and not present:
        return None
    rule = [f"contain {' and '.join(map(repr, missing))}"] if missing else []
    rule += [f"not contain {' or '.join(map(repr, present))}"] if present else []
    return (
        f"model_name={name!r} must {' and '.join(rule)} for {kind} (model_type="
        f"{config.get('model_type')!r}): rename the folder, or pass such a model_name to load_pretrained_model"
    )


def name_from_path(path: str) -> str:
    """The model_name that LLaVA's scripts make of a path: its last part, of ``checkpoint-N`` with the one before."""
    parts = os.path.abspath(path).split(os.sep)
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def check_layers(config: Mapping[str, Any], settings: MMFuserConfig, setting: str) -> bool:
    """Check layers against the checkpoint's tower; without it, their order as far as it can be known.

    Returns:
        Whether the tower's config is on this machine.

    Raises:
        ValueError: see `MMFuserConfig.resolve`; `setting` is the name in it.
    """
    tower = local_tower(config)
    if tower is not None:
        settings.resolve(tower, setting)
    elif isinstance(settings.layers, tuple):
        check_order(settings.layers, None, setting)
    return tower is not None


def inspect(path: str) -> Tuple[List[str], Optional[str]]:
    """What a checkpoint folder or an adapter file holds, and whether it loads.

    Returns:
        Lines to show, and the reason why it does not load, or None.

    Raises:
        ValueError: there is no such file or folder.
        OSError: reading fails.
    """
    if not (os.path.isfile(path) or os.path.isdir(path)):  # reading a device may never end
        raise ValueError(f"{path} is neither a file nor a folder on this machine")
    lines: List[str] = []
    try:
        lines += [f"path: {path}"]
        for line in _folder_lines(path) if os.path.isdir(path) else _adapter_lines(path):
            lines.append(line)
    except ValueError as error:
        return lines, str(error)
    return lines, None


def _folder_lines(folder: str) -> Iterator[str]:
    """The lines of `inspect`; raises ValueError where it finds why the checkpoint does not load."""
    config = read_config(folder)
    if config is not None:
        yield from _setting_lines(config)
    checkpoint = read_checkpoint(folder)
    lora = [file for file in LORA if file in checkpoint.others][:1]
    names = [w.name for weights in checkpoint.weights.values() for w in weights]
    names += [weight.name for file in lora for weight in read_weights(folder, file)]
    kind = folder_kind(folder)
    format_name = {
        "ours": "llava_mmfuser's format",
        "authors": "the authors' format",
        "llava": "plain LLaVA, without a fuser",
        "other": "no LLaVA",
    }[checkpoint.format()]
    yield f"type: {kind.partition(' ')[2]} ({describe(names)}), {format_name}"
    for weights in checkpoint.projectors().values():
        yield from _weight_lines(folder, weights)
    if checkpoint.left_out:
        yield f"not looked at: {', '.join(checkpoint.left_out)}"
    if checkpoint.format() == "other":
        raise ValueError(
            "config.json has neither mm_vision_tower nor mm_projector_type, so this is no LLaVA checkpoint"
        )
    if checkpoint.format() == "authors":
        raise ValueError(f"it is {convert_hint(folder)}")
    if kind == MIXED:
        raise ValueError(
            "it holds a full checkpoint and an adapter_config.json, of which transformers takes the latter, and leaves "
            "out the projector; move one of them away"
        )
    for file in checkpoint.shards:
        if file.endswith(".safetensors"):
            metadata = read_header(os.path.join(folder, file))[0].get("__metadata__") or {}
            if metadata.get("format") not in ("pt", "tf", "flax"):
                raise ValueError(f"{file} has no 'format' in its metadata, which transformers asks for; save it again")
    yield from _fit_lines(checkpoint.config, checkpoint.projectors())
    check_tower_is_there(config)
    problem = name_problem(name_from_path(folder), kind, config)
    if problem:
        yield f"{NAME_NOTE}, and {problem}"


def _adapter_lines(path: str) -> Iterator[str]:
    folder, file = os.path.split(os.path.abspath(path))
    config = read_config(folder)
    if config is not None:
        yield from _setting_lines(config)
    weights = read_weights(folder, file)
    kind = describe([weight.name for weight in weights])
    yield f"type: {kind}"
    projector = projector_weights(weights)
    if kind.startswith(("weights of a whole model", "LoRA weights")):
        raise ValueError(f"{file} is a part of a checkpoint, not an adapter; inspect its folder: {folder}")
    if not projector:
        raise ValueError(f"{file} has no weights of a projector (no name with {MARK!r})")
    yield from _weight_lines(folder, projector)
    if is_published(projector):
        yield "note: the authors' names; --pretrain_mm_mlp_adapter translates them"
        linear = config is not None and settings_of(config).projector == "linear"
        projector = {from_published(name, linear): weight for name, weight in projector.items()}
    if config is not None:
        yield from _fit_lines(config, {file: projector})
    else:
        yield "warning: no config.json beside it, so its settings are unknown and its shapes were not compared"


def _setting_lines(config: Dict[str, Any]) -> Iterator[str]:
    shown = {key: value for key, value in config.items() if key.startswith("mm_") or key == "hidden_size"}
    if config.get("mm_projector_type") == PROJECTOR_TYPE or is_authors_config(config):
        settings = settings_of(config)
        yield f"layers: {spell(settings.layers)}"
        fuser = {FLAG_PREFIX + name: value for name, value in dataclasses.asdict(settings).items()}
        shown = {**fuser, **shown}
    for key in sorted(shown):
        yield f"{key}: {spell(shown[key])}"


def _weight_lines(folder: str, weights: Mapping[str, Weight]) -> Iterator[str]:
    """Which file holds what part of a projector, and how far the gates are open."""
    published = is_published(weights)
    parts: Dict[Tuple[str, str], List[Weight]] = {}
    for name, weight in weights.items():
        fuser = name.startswith("0." if published else "fuser.")
        parts.setdefault((weight.file, "fuser" if fuser else "MLP"), []).append(weight)
    for (file, part), found in sorted(parts.items()):
        yield f"weights: {file}: {part}, {len(found)} tensors ({', '.join(sorted({w.dtype for w in found}))})"
    for gate, ours in (("cross", "fuser.cross_gate.scale"), ("self", "fuser.self_gate.scale")):
        name = to_published(ours) if published else ours
        if name in weights:
            size = read_tensor(folder, weights[name]).float().abs()
            yield f"{gate} gate: mean |g| {size.mean():.4g}, max |g| {size.max():.4g}"


def _fit_lines(config: Mapping[str, Any], projectors: Mapping[str, Mapping[str, Weight]]) -> Iterator[str]:
    """Compare weights under our names with the config."""
    settings = settings_of(config)
    if not projectors:
        raise ValueError(f"there are no weights of a projector (no name with {MARK!r})")
    fused = config.get("mm_projector_type") == PROJECTOR_TYPE or is_authors_config(config)
    tower = local_tower(config)
    if fused and not check_layers(config, settings, layers_setting(config)):
        name = config.get("mm_vision_tower")
        yield f"note: layers not compared with the vision tower, because the config of {name!r} is not on this machine"
    for label, weights in projectors.items():
        problem = misfit(config, weights)
        if problem:
            raise ValueError(f"{label}: {problem}")
        has_weights = FUSIONS[settings.fusion].has_weights
        if fused and has_weights and not any(name.startswith("fuser.") for name in weights):
            yield f"warning: {label} has no weights of the fuser, which starts as the identity"
    if fused:
        check_features(SimpleNamespace(**config))
        if tower is not None:
            check_tower(config, tower)


def misfit(
    config: Mapping[str, Any], weights: Mapping[str, Weight], expected: Optional[Shapes] = None
) -> Optional[str]:
    """Why a projector's weights do not fit a config.json, and under which settings they would; None if they do.

    Args:
        config: of plain LLaVA, of our format, or the authors'.
        weights: by their name behind ``mm_projector.``, under our names.
        expected: names and shapes of the projector that was built by `config`; None works them out.

    Raises:
        ValueError: a setting that is not allowed.
    """
    settings = settings_of(config)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    fuser = [name for name in weights if name.startswith("fuser.")]
    kind = config.get("mm_projector_type", "linear")
    if fuser and kind != PROJECTOR_TYPE and not is_authors_config(config):
        settings = MMFuserConfig.from_llava({**config, "mm_fuser_projector": inner_projector(shapes) or "mlp2x_gelu"})
        fits = not differences(shapes, projector_shapes(config, settings))
        advice = "" if fits else _advice(config, shapes, settings)
        return (
            f"mm_projector_type={kind!r} in config.json, but the weights hold a fuser ({len(fuser)} tensors); write "
            f"mm_projector_type: {PROJECTOR_TYPE}, with the mm_fuser_* settings that it was trained with{advice}"
        )
    expected = projector_shapes(config, settings) if expected is None else expected
    if any(weight.dtype not in DTYPES.values() for name, weight in weights.items() if name not in fuser):
        # bitsandbytes stores the MLP of a quantised model in its own shapes and under more names, but never the fuser
        shapes, expected = ({n: s for n, s in of.items() if n.startswith("fuser.")} for of in (shapes, expected))
    problems = compare(shapes, expected)
    return f"weights do not fit config.json: {problems}{_advice(config, shapes, settings)}" if problems else None


def inner_projector(names: Iterable[str]) -> Optional[str]:
    """The ``mm_projector_type`` of the layers behind a fuser by the names of their weights; None if there are none."""
    layers = [name for name in names if re.fullmatch(r"(\d+\.)?weight", name)]
    return None if not layers else "linear" if layers == ["weight"] else f"mlp{len(layers)}x_gelu"


def _advice(config: Mapping[str, Any], shapes: Shapes, settings: MMFuserConfig) -> str:
    """With which settings these weights would fit, as far as weights can tell; empty if with none."""
    if not any(name.startswith("fuser.") for name in shapes):
        return ""

    def expected(changes: Mapping[str, Any]) -> Shapes:
        with contextlib.suppress(ValueError):  # heads that do not divide the width
            return projector_shapes(config, dataclasses.replace(settings, **changes))
        return {}

    def changes(values: Mapping[str, Iterable[Any]]) -> Iterator[Dict[str, Any]]:
        for combination in itertools.product(*values.values()):
            change = dict(zip(values, combination))
            yield {name: value for name, value in change.items() if value != getattr(settings, name)}

    by_name = {
        "projector": [inner_projector(shapes) or settings.projector],
        "fusion": FUSIONS,
        "attention": ATTENTION_KINDS,
        "self_attention": (True, False),
    }
    named = [change for change in changes(by_name) if set(expected(change)) == set(shapes)]
    fewest = min((len(change) for change in named), default=0)
    fitting = []
    for change in (change for change in named if len(change) == fewest):
        # what only the shapes tell, one setting at a time
        others = [{}, *({"layers": tuple(range(count))} for count in range(2, 65))]
        others += [{name: value} for name in ("num_heads", "num_points") for value in range(1, 65)]
        texts = [_spell_changes({**change, **other}) for other in others if expected({**change, **other}) == shapes]
        fitting += texts[:1] if expected(change) == shapes else texts
    return f". They fit {' or '.join(dict.fromkeys(fitting))}" if any(fitting) else ""


def _spell_changes(changes: Mapping[str, Any]) -> str:
    spelled = {name: f"{FLAG_PREFIX}{name}={value}" for name, value in changes.items()}
    if "layers" in spelled:
        spelled["layers"] = f"mm_fuser_layers of {len(changes['layers'])} layers"
    return " with ".join(spelled.values())


def check_weights(
    config: Mapping[str, Any],
    expected: Optional[Shapes],
    loaded_keys: Sequence[str],
    files: Sequence[str],
    state_dict: Optional[Mapping[str, torch.Tensor]],
) -> None:
    """Refuse a whole model's weights that do not fit its config, before they are read.

    Args:
        config: of the model that is made; it may come from another folder, as that of an adapter.
        expected: see `misfit`.
        loaded_keys: names of the weights, by the index where there is one.
        files: paths of the weight files, of which headers are read, if there is no state_dict.
        state_dict: names to tensors, or None.

    Raises:
        ValueError: see `misfit`; weights of the authors' fork; an index that names other projector weights than its
            shards have.
    """
    if state_dict is not None:
        weights = [Weight("", name, str(t.dtype)[6:], tuple(t.shape)) for name, t in state_dict.items() if MARK in name]
    else:
        weights = [weight for path in files for weight in read_weights(*os.path.split(path)) if MARK in weight.name]
    listed = {name for name in loaded_keys if MARK in name}
    differing = sorted(listed ^ {weight.name for weight in weights})
    if differing:
        raise ValueError(
            f"the index of the shards and the shards disagree about {', '.join(differing[:3])} "
            f"({len(differing)} tensors); the files belong to different checkpoints, so copy them again"
        )
    projector = projector_weights(weights)
    if is_published(projector):
        raise ValueError("the weights have the names of the authors' MMFuser fork; convert them first")
    problem = misfit(config, projector, expected) if projector else None
    if problem:
        raise ValueError(problem)


def read_tensor(folder: str, weight: Weight) -> torch.Tensor:
    """One tensor of a checkpoint."""
    path = os.path.join(folder, weight.file)
    if not path.endswith(".safetensors"):
        return load_bin(path)[weight.name]
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        return stream.get_tensor(weight.name)


def projector_weights(weights: Iterable[Weight]) -> Dict[str, Weight]:
    """Those of a projector, by their name behind ``mm_projector.``."""
    projector = {weight.name.split(MARK, 1)[1]: weight for weight in weights if MARK in weight.name}
    without_wrapper(projector)
    return projector
