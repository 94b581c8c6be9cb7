"""Checkpoints: reading their layout, converting them from and to the authors' format, adding a fuser to released ones.

Every command makes a plan, a list of `Step`, from the input, which is only read, and checks all it can before
`writing` writes the first byte. A safetensors file gets a new header in front of its old data, a ``.bin`` is
memory-mapped. The returned notes say what is left out: what transformers would not load, optimizer states (which follow
the old order of parameters), subfolders, and code.
"""

import dataclasses
import json
import os
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch

from ..block.kinds import FUSIONS, refuse_open
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig
from ..layers import Layers
from ..names import MARK, Format, from_published, to_published
from ..towers import check_features, local_tower, tower_config
from . import writing
from .files import DTYPES
from .folder import LORA, Checkpoint, read_checkpoint
from .verdict import CONVERT, TO_AUTHORS, UPGRADE, check_format, check_tower, judge
from .writing import Step


def convert(source: str, out: str, to_authors: bool = False, link: bool = False) -> List[str]:
    """Write a checkpoint, adapter or LoRA folder of the authors' fork in our format, or the other way round.

    Args:
        source, out: folder to read, and folder to make.
        to_authors: from our format to theirs.
        link: hard-link weight files that stay as they are; they are copied where that is impossible.

    Returns:
        Notes for the user, one per line.

    Raises:
        ValueError: `judge` says no; an `out` that exists or lies in `source`; a disk that is too small.
        OSError: reading or writing fails.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    config = dict(checkpoint.config)
    settings = judge(checkpoint, TO_AUTHORS if to_authors else CONVERT, local_tower(config)).check()
    if to_authors:
        config = {key: value for key, value in config.items() if not key.startswith(FLAG_PREFIX)}
        config.update(mm_projector_type=settings.projector, mm_vision_select_layer=list(settings.layers))
    else:
        config.update(mm_projector_type=PROJECTOR_TYPE, mm_vision_select_layer=settings.layers[-1])
        config.update(settings.to_llava())
    short = to_published if to_authors else partial(from_published, linear=settings.projector == "linear")

    def rename(name: str) -> str:
        before, mark, rest = name.partition(MARK)
        return before + mark + short(rest) if mark else name

    link, notes = may_link(link, source, out)
    steps = [
        writing.renamed(checkpoint.path(file), rename)
        if any(MARK in weight.name for weight in checkpoint.weights[file])
        else writing.unchanged(checkpoint.path(file), file, link)
        for file in checkpoint.shards + checkpoint.adapters
    ]
    if checkpoint.index:
        weight_map = {rename(name): file for name, file in checkpoint.index["weight_map"].items()}
        steps.append(_index_step(checkpoint, {**checkpoint.index, "weight_map": weight_map}))
    return notes + finish("convert", checkpoint, out, steps, config, link)


def upgrade(
    source: str, out: str, link: bool = False, vision_tower: Optional[str] = None, settings: Mapping[str, Any] = {}
) -> List[str]:
    """Put a fresh fuser in front of the projector of a released LLaVA: a checkpoint, an adapter or a LoRA folder.

    The result answers bit for bit as the input, because a fresh fuser is the identity; its weights behind the closed
    gates are random and differ between runs. The model's weight files stay as they are, under the names of shards; the
    fuser gets one of its own. In an adapter or LoRA folder it joins the projector in its file.

    Args:
        source, out, link: as of `convert`.
        vision_tower: where to read the tower's config; None takes ``mm_vision_tower`` of config.json.
        settings: fields of `MMFuserConfig` to values; those that are absent get their defaults.

    Returns:
        Notes for the user, one per line.

    Raises:
        ValueError: as `convert`; see `upgrade_settings`.
        OSError: reading or writing fails.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.LLAVA, "upgrade")
    config = dict(checkpoint.config)
    resolved, tower = upgrade_settings(config, dict(settings), vision_tower or config.get("mm_vision_tower"))
    config.update(mm_projector_type=PROJECTOR_TYPE, mm_hidden_size=tower.hidden_size, **resolved.to_llava())
    config["mm_vision_select_layer"] = Layers.parse(config["mm_vision_select_layer"])[-1]  # an int, if it was a text
    widths = {**checkpoint.config, "mm_hidden_size": tower.hidden_size}
    judge(dataclasses.replace(checkpoint, config=widths), UPGRADE).check()
    fresh = resolved.build(tower.hidden_size, config["hidden_size"]).state_dict()
    link, notes = may_link(link, source, out)
    steps = []
    for label, weights in {**dict.fromkeys(checkpoint.adapters, {}), **checkpoint.projectors()}.items():
        like = next(iter(weights.values()), None)
        if like is None:
            steps.append(writing.unchanged(checkpoint.path(label), label, link))
            continue
        if like.dtype not in DTYPES.values():
            raise ValueError(f"{like.file}: {like.name} is {like.dtype}; only a projector in floating point is allowed")
        prefix = like.name.split(MARK)[0] + MARK + "fuser."
        fuser = {prefix + name: value.to(getattr(torch, like.dtype)) for name, value in fresh.items()}
        if label in checkpoint.adapters:
            steps.append(writing.renamed(checkpoint.path(label), str, fuser))
        else:
            steps += with_new_shard(checkpoint, fuser, link)
    return notes + finish("upgrade", checkpoint, out, steps, config, link)


def upgrade_settings(
    config: Mapping[str, Any], given: Dict[str, Any], name: Optional[str], tower: Optional[Any] = None
) -> Tuple[MMFuserConfig, Any]:
    """The settings with resolved layers, and the tower's config, which is read by its name if it is None."""
    inner = config.get("mm_projector_type", "linear")
    wanted = given.setdefault("projector", inner)
    if wanted != inner:
        raise ValueError(f"mm_fuser_projector={wanted!r}, but the checkpoint's projector is {inner!r}; drop the flag")
    check_features(config)
    query = Layers.parse(config.get("mm_vision_select_layer"), "config.json: mm_vision_select_layer")
    given["layers"] = Layers.parse_listed(given["layers"], query) if "layers" in given else query
    if not isinstance(name, str):
        raise ValueError("config.json has no mm_vision_tower; give --vision-tower PATH")
    settings = MMFuserConfig(**given)
    settings.refuse_useless(given)
    refuse_open(settings.start, "the checkpoint's")
    if not FUSIONS[settings.fusion].starts_as_identity:
        allowed = " or ".join(name for name, row in FUSIONS.items() if row.starts_as_identity)
        raise ValueError(
            f"mm_fuser_fusion={settings.fusion} does not start as an identity, so the upgraded checkpoint would answer "
            f"otherwise; use {allowed}, or train with it"
        )
    try:
        tower = tower_config(name) if tower is None else tower
    except ValueError as error:
        raise ValueError(f"{error}; name a folder that has it by --vision-tower PATH") from error
    settings = settings.resolve(tower)
    check_tower(config, tower)
    own = query[-1] % (tower.num_hidden_layers + 1)
    if settings.layers[-1] != own:
        found = f"mm_fuser_layers={settings.layers} ends at layer {settings.layers[-1]}"
        before = f"the projector was trained on layer {own} (mm_vision_select_layer={query})"
        raise ValueError(f"{found}, but {before}; end the list with {own}")
    return settings, tower


def check_out(source: str, out: str) -> None:
    if os.path.lexists(os.path.abspath(out)):
        raise ValueError(f"{out or os.curdir} exists already; choose another name or delete it")
    inside, outside = os.path.realpath(out), os.path.realpath(source)
    if os.path.commonpath([inside, outside]) == outside:
        raise ValueError(f"{out} lies inside the input {source}, which is never changed; choose a place outside")
    parent = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(parent):
        raise ValueError(f"{parent} is not a folder; make it first, or choose another place for {out}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} is not writable; choose another place for {out}")


def may_link(link: bool, source: str, out: str) -> Tuple[bool, List[str]]:
    if link and os.stat(source).st_dev != os.stat(os.path.dirname(os.path.abspath(out))).st_dev:
        return False, [f"{out} is on another file system, so weight files are copied, not linked"]
    return link, []


def with_new_shard(
    checkpoint: Checkpoint, tensors: Dict[str, torch.Tensor], link: bool, rename: Callable[[str], str] = str
) -> List[Step]:
    """The model's files under the names of the first n of n + 1 shards, with their tensors renamed, one more with
    `tensors`, and the index."""
    safe = checkpoint.shards[0].endswith(".safetensors")
    stem, ending = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    total = len(checkpoint.shards) + 1
    names = [f"{stem}-{number:05d}-of-{total:05d}{ending}" for number in range(1, total + 1)]
    steps = [
        writing.renamed(checkpoint.path(file), rename)._replace(name=name)
        if any(rename(weight.name) != weight.name for weight in checkpoint.weights[file])
        else writing.unchanged(checkpoint.path(file), name, link)
        for file, name in zip(checkpoint.shards, names)
    ]
    size = sum(value.nbytes for value in tensors.values())
    steps.append(writing.added(names[-1], tensors))
    weight_map = {
        rename(w.name): name for file, name in zip(checkpoint.shards, names) for w in checkpoint.weights[file]
    }
    weight_map.update(dict.fromkeys(tensors, names[-1]))
    old = checkpoint.index or {"metadata": {}}
    old_size = old["metadata"].get("total_size")
    if not isinstance(old_size, int):
        old_size = sum(os.path.getsize(checkpoint.path(file)) for file in checkpoint.shards)
    index = {**old, "metadata": {**old["metadata"], "total_size": old_size + size}, "weight_map": weight_map}
    return steps + [_index_step(checkpoint, index)]


def _index_step(checkpoint: Checkpoint, index: Dict[str, Any]) -> Step:
    safe = checkpoint.shards[0].endswith(".safetensors")
    name = ("model.safetensors" if safe else "pytorch_model.bin") + ".index.json"
    return writing.text(name, json.dumps(index, indent=2) + "\n")


def finish(
    command: str,
    checkpoint: Checkpoint,
    out: str,
    steps: List[Step],
    config: Dict[str, Any],
    link: bool,
    own: Optional[Mapping[str, Any]] = None,
) -> List[str]:
    """Carry out `steps`, then copy the other files and at last write config.json. Returns notes for the user.

    No code of others is copied, nor what points to some, see `writing.carried`; `own` joins config.json after that.
    """
    made = [step.name for step in steps]
    others, code = writing.carried(checkpoint.folder, checkpoint.others, made, LORA if link else ())
    clean = writing.without_pointers(config)
    code += ["auto_map in config.json"] if clean != config else []
    steps = [*steps, *others, writing.text("config.json", json.dumps({**clean, **(own or {})}, indent=2) + "\n")]
    writing.write_folder(checkpoint.folder, out, steps, command)
    notes = writing.code_note(code)
    notes += [f"left out of {out}: {', '.join(checkpoint.left_out)}"] if checkpoint.left_out else []
    return notes + [f"{out} is complete: {len(steps)} files"]
