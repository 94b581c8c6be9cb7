"""A checkpoint folder as transformers and LLaVA would read it. Only the headers of weight files are read.

That is safetensors before ``.bin``, one file before shards, then adapters.
"""

import os
import re
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, Iterable, List, Mapping, Optional, Tuple

from ..names import Format, format_of
from .files import Weight, projector_weights, read_config, read_json, read_weights

_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
NON_LORA = "non_lora_trainables.bin"
_ADAPTERS = ("mm_projector.bin", NON_LORA)
MODEL = "the model"
LORA = ("adapter_model.safetensors", "adapter_model.bin")
_LEFT_OUT = re.compile(
    r"(model|pytorch_model)(-.*)?\.(safetensors|bin)(\.index\.json)?|(tf|flax)_model.*|(optimizer|scheduler|rng_state).*"
)
FULL, LORA_FOLDER, ADAPTER_FOLDER = "a full checkpoint", "a LoRA folder", "an adapter folder"
MIXED = "a LoRA folder with a full checkpoint in it"


@dataclass(frozen=True)
class Checkpoint:
    """A folder as transformers and LLaVA would read it."""

    folder: str
    config: Dict[str, Any]  # without `POINTERS`
    weights: Dict[str, List[Weight]] = field(default_factory=dict)  # of every file in shards and adapters
    shards: List[str] = field(default_factory=list)  # the whole model's files, in loading order; none of an adapter
    adapters: List[str] = field(default_factory=list)  # other files that may hold the projector
    index: Dict[str, Any] = field(default_factory=dict)  # of the shards; empty where there is none
    others: List[str] = field(default_factory=list)  # copied as they are
    left_out: List[str] = field(default_factory=list)

    def path(self, file: str) -> str:
        """Where a file of the folder lies."""
        return os.path.join(self.folder, file)

    def projectors(self) -> Dict[str, Dict[str, Weight]]:
        """For the model and for each adapter that has any: weights by their name behind ``mm_projector.``."""
        sources = {MODEL: self.shards, **{file: [file] for file in self.adapters}}
        found = {label: projector_weights(w for f in own for w in self.weights[f]) for label, own in sources.items()}
        return {label: weights for label, weights in found.items() if weights}

    def format(self) -> Format:
        """See `format_of`."""
        return format_of(self.config, self.projectors().values())


def read_checkpoint(folder: str) -> Checkpoint:
    """Read the config, the index and the headers of all weights of a checkpoint folder; refuse what is absent, damaged
    or contradicts another file."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; name the folder of a checkpoint that is on this machine")
    config = read_config(folder)
    if config is None:
        raise ValueError(f"{folder} has no config.json; name the folder in which LLaVA saved it with the weights")
    entries = sorted(os.listdir(folder))
    files = [name for name in entries if os.path.isfile(os.path.join(folder, name))]
    unreadable = [name for name in files if not os.access(os.path.join(folder, name), os.R_OK)]
    if unreadable:
        raise ValueError(f"{os.path.join(folder, unreadable[0])} cannot be read; check its permissions")
    model = next((name for name in _MODELS if name in files), "")
    index: Dict[str, Any] = {}
    shards = [model] if model else []
    if model.endswith(".json"):
        index, shards = _read_index(folder, model)
    adapters = [name for name in _ADAPTERS if name in files]
    if not shards and not adapters:
        raise ValueError(f"{folder} has no weights; looked for {', '.join(_MODELS + _ADAPTERS)}")
    if "adapter_config.json" in files and not set(LORA) & set(files):
        raise ValueError(f"{folder} has an adapter_config.json, but neither {' nor '.join(LORA)}; copy it again")
    weights = {file: read_weights(folder, file) for file in shards + adapters}
    for file in shards if index else []:
        listed = {name for name, shard in index["weight_map"].items() if shard == file}
        check_index(listed, weights[file], f"{os.path.join(folder, model)} and {file}")
    used = {*shards, *adapters, model, "config.json"}
    left_out = [n for n in files if n not in used and _LEFT_OUT.fullmatch(n)]
    others = [name for name in files if name not in used and name not in left_out]
    folders = [name + "/" for name in entries if os.path.isdir(os.path.join(folder, name))]
    return Checkpoint(folder, config, weights, shards, adapters, index, others, left_out + folders)


def check_index(listed: Collection[str], weights: Iterable[Weight], files: str) -> None:
    """Refuse an index of shards that names other weights than there are; transformers would take it at its word."""
    differing = sorted(set(listed) ^ {weight.name for weight in weights})
    if differing:
        what = f"{files} disagree about {', '.join(differing[:3])} ({len(differing)} tensors)"
        raise ValueError(f"{what}; the files belong to different checkpoints, so copy them again")


def _read_index(folder: str, name: str) -> Tuple[Dict[str, Any], List[str]]:
    path = os.path.join(folder, name)
    index = read_json(path)
    if not isinstance(index, dict) or not all(isinstance(index.get(key), dict) for key in ("metadata", "weight_map")):
        raise ValueError(f"{path} is not an index of shards: it needs the objects 'metadata' and 'weight_map'")
    shards = sorted(set(map(str, index["weight_map"].values())))
    for shard in shards:
        if os.path.basename(shard) != shard or not shard.endswith((".safetensors", ".bin")):
            raise ValueError(f"{path} names the shard {shard!r}; only weight files in the same folder are allowed")
        if not os.path.isfile(os.path.join(folder, shard)):
            raise ValueError(f"{path} names the shard {shard}, which is not there; download or copy it again")
    return index, shards


def folder_kind(folder: str) -> str:
    """`FULL`, `LORA_FOLDER`, `ADAPTER_FOLDER`, or `MIXED`, which transformers reads as the LoRA that it is, too."""
    full = any(os.path.isfile(os.path.join(folder, name)) for name in _MODELS)
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return MIXED if full else LORA_FOLDER
    has_adapter = any(os.path.isfile(os.path.join(folder, name)) for name in _ADAPTERS)
    return ADAPTER_FOLDER if has_adapter and not full else FULL


def name_problem(name: str, kind: str, config: Mapping[str, Any]) -> Optional[str]:
    """What is wrong with the model_name that `load_pretrained_model` goes by; None if nothing. See `folder_kind`."""
    is_lora, name_type = kind in (LORA_FOLDER, MIXED), str(config.get("model_type"))
    missing = [word for word in ["llava"] + ["lora"] * is_lora if word not in name.lower()]
    unwanted = ["lora"] * (kind == ADAPTER_FOLDER) + ["mpt"] * (not is_lora and "mpt" not in name_type)
    present = [word for word in unwanted if word in name.lower()]
    rule = [f"contain {' and '.join(map(repr, missing))}"] if missing else []
    rule += [f"not contain {' or '.join(map(repr, present))}"] if present else []
    advice = "rename the folder, or pass such a model_name to load_pretrained_model"
    what = f"{kind} (model_type={config.get('model_type')!r})"
    return f"model_name={name!r} must {' and '.join(rule)} for {what}: {advice}" if rule else None


def name_from_path(path: str) -> str:
    """The model_name that LLaVA's scripts make of a path: its last part, of ``checkpoint-N`` with the one before."""
    parts = os.path.abspath(path).split(os.sep)
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
