"""Converting checkpoints from and to the authors' format, and adding a fuser to released ones.

Every command makes a plan, a list of `Step`, from the input, which is only read, and checks all it can before `writing`
writes the first byte. Its notes say what is left out: what transformers would not load, optimizer states (which follow
the old order of parameters), subfolders, and code.
"""

import dataclasses
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
from .files import DTYPES, Weight, weight_of
from .folder import LORA, Checkpoint, read_checkpoint
from .verdict import CONVERT, TO_AUTHORS, UPGRADE, check_format, check_tower, judge
from .writing import Step


def convert(source: str, out: str, to_authors: bool = False, link: bool = False) -> List[str]:
    """Write a checkpoint, adapter or LoRA folder of the authors' fork in our format, or the other way round.

    `link` hard-links weight files that stay as they are; they are copied where that is impossible. Returns notes for
    the user, one per line. Raises ValueError for what is refused, and OSError where reading or writing fails.
    """
    link, notes = check_out(source, out, link)
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

    files = checkpoint.shards + checkpoint.adapters
    steps = [_kept(checkpoint, file, file, rename, link) for file in files]
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

    `settings` are fields of `MMFuserConfig`. For the rest see `convert`.
    """
    link, notes = check_out(source, out, link)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.LLAVA, "upgrade")
    config = dict(checkpoint.config)
    resolved, tower = upgrade_settings(config, dict(settings), vision_tower or config.get("mm_vision_tower"))
    config.update(mm_projector_type=PROJECTOR_TYPE, mm_hidden_size=tower.hidden_size, **resolved.to_llava())
    config["mm_vision_select_layer"] = Layers.parse(config["mm_vision_select_layer"])[-1]  # an int, if it was a text
    widths = {**checkpoint.config, "mm_hidden_size": tower.hidden_size}
    judge(dataclasses.replace(checkpoint, config=widths), UPGRADE).check()
    fresh = resolved.build(tower.hidden_size, config["hidden_size"]).state_dict()
    steps = []
    for label, weights in {**dict.fromkeys(checkpoint.adapters, {}), **checkpoint.projectors()}.items():
        like = next(iter(weights.values()), None)
        if like is None:
            steps.append(writing.unchanged(checkpoint.path(label), label, link))
            continue
        if like.dtype not in DTYPES.values():
            raise ValueError(f"{like.file}: {like.name} is {like.dtype}; only a projector in floating point is allowed")
        fuser = fuser_weights(fresh, like.name.split(MARK)[0] + MARK + "fuser.", like.dtype)
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
        why = "does not start as an identity, so the upgraded checkpoint would answer otherwise"
        raise ValueError(f"mm_fuser_fusion={settings.fusion} {why}; use {allowed}, or train with it")
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


def fuser_weights(fresh: Mapping[str, torch.Tensor], prefix: str, dtype: str) -> Dict[str, Weight]:
    return {prefix + name: weight_of(name, value.to(getattr(torch, dtype))) for name, value in fresh.items()}


def check_out(source: str, out: str, link: bool = False) -> Tuple[bool, List[str]]:
    """Refuse a place for the output; returns whether files can be hard-linked there, and a note if they cannot."""
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
    if link and os.path.isdir(source) and os.stat(source).st_dev != os.stat(parent).st_dev:
        return False, [f"{out} is on another file system, so weight files are copied, not linked"]
    return link, []


def _kept(checkpoint: Checkpoint, file: str, name: str, rename: Callable[[str], str], link: bool) -> Step:
    """A weight file under a new name, with its tensors renamed if any has another name then."""
    if any(rename(weight.name) != weight.name for weight in checkpoint.weights[file]):
        return writing.renamed(checkpoint.path(file), rename)._replace(name=name)
    return writing.unchanged(checkpoint.path(file), name, link)


def with_new_shard(
    checkpoint: Checkpoint, weights: Dict[str, Weight], link: bool, rename: Callable[[str], str] = str
) -> List[Step]:
    """The model's files under the names of the first n of n + 1 shards, with their tensors renamed, one more with
    `weights`, and the index."""
    safe = checkpoint.shards[0].endswith(".safetensors")
    stem, ending = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    names = writing.shard_names(stem, ending, len(checkpoint.shards) + 1)
    files = list(zip(checkpoint.shards, names))
    weight_map = {rename(weight.name): name for file, name in files for weight in checkpoint.weights[file]}
    weight_map.update(dict.fromkeys(weights, names[-1]))
    steps = [_kept(checkpoint, file, name, rename, link) for file, name in files]
    steps.append(writing.added(names[-1], weights))
    old = checkpoint.index or {"metadata": {}}
    size = old["metadata"].get("total_size")
    if not isinstance(size, int):
        size = sum(os.path.getsize(checkpoint.path(file)) for file in checkpoint.shards)
    metadata = {**old["metadata"], "total_size": size + steps[-1].size}
    return steps + [_index_step(checkpoint, {**old, "metadata": metadata, "weight_map": weight_map})]


def _index_step(checkpoint: Checkpoint, index: Dict[str, Any]) -> Step:
    stem = "model.safetensors" if checkpoint.shards[0].endswith(".safetensors") else "pytorch_model.bin"
    return writing.as_json(stem + ".index.json", index)


def finish(
    command: str, checkpoint: Checkpoint, out: str, steps: List[Step], config: Any, link: bool, own: Any = None
) -> List[str]:
    """Carry out `steps`, then copy the other files and at last write config.json. Returns notes for the user.

    No code of others is copied, nor what points to some, see `writing.carried`; `own` joins config.json after that.
    """
    made = [step.name for step in steps]
    others, code = writing.carried(checkpoint.folder, checkpoint.others, made, LORA if link else ())
    clean = writing.without_pointers(config)
    code += ["auto_map in config.json"] if clean != config else []
    steps = [*steps, *others, writing.as_json("config.json", {**clean, **(own or {})})]
    writing.write_folder(checkpoint.folder, out, steps, command)
    notes = writing.code_note(code)
    notes += [f"left out of {out}: {', '.join(checkpoint.left_out)}"] if checkpoint.left_out else []
    return notes + [f"{out} is complete: {len(steps)} files"]
