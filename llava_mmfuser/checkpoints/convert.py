"""Checkpoints: reading their layout, converting them from and to the authors' format, adding a fuser to released ones.

Every command makes a plan, a list of `Step`, from the input, which is only read, and checks all it can before
`writing` writes the first byte. Weights are never held in memory: a safetensors file gets a new header in front of
its old data, a ``.bin`` is memory-mapped. What transformers would load is converted: safetensors before ``.bin``, one
file before shards; weights in other formats, optimizer states (which follow the old order of parameters) and subfolders
are left out, which the returned notes say.
"""

import json
import os
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch

from ..block.kinds import FUSIONS
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig
from ..layers import Layers
from ..names import (
    MARK,
    Format,
    Shapes,
    compare,
    convert_hint,
    from_published,
    is_authors_config,
    native_hint,
    to_published,
)
from ..towers import check_features, tower_config
from . import writing
from .files import DTYPES
from .fit import check_layers, projector_shapes, settings_of
from .folder import LORA, MODEL, Checkpoint, read_checkpoint
from .writing import Step

AUTHORS_SETTINGS = MMFuserConfig(layers=Layers((-22, -17, -12, -7, -2)))  # their code fixes all but these numbers


def convert(source: str, out: str, to_authors: bool = False, link: bool = False) -> List[str]:
    """Write a checkpoint, adapter or LoRA folder of the authors' fork in our format, or the other way round.

    Args:
        source: folder to read.
        out: folder to make.
        to_authors: from our format to theirs.
        link: hard-link weight files that stay as they are; they are copied where that is impossible.

    Returns:
        Notes for the user, one per line.

    Raises:
        ValueError: input that is damaged, in another format or with settings that the authors' code does not have;
            an `out` that exists or lies in `source`; a disk that is too small, or that fills up.
        OSError: reading or writing fails.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.OURS if to_authors else Format.AUTHORS, "convert")
    config = dict(checkpoint.config)
    if to_authors:
        settings = _authors_settings(checkpoint, settings_of(config))
        config = {key: value for key, value in config.items() if not key.startswith(FLAG_PREFIX)}
        config.update(mm_projector_type=settings.projector, mm_vision_select_layer=list(settings.layers))
    else:
        if not is_authors_config(config):
            given = config.get("mm_vision_select_layer")
            raise ValueError(
                f"mm_vision_select_layer={given!r} in {source}/config.json, but the weights are those of the authors' "
                f"fork; write the five layers it was trained with there, such as [-22, -17, -12, -7, -2]"
            )
        settings = _authors_settings(checkpoint, settings_of(config))
        config.update(mm_projector_type=PROJECTOR_TYPE, mm_vision_select_layer=settings.layers[-1])
        config.update(settings.to_llava())
    expected = projector_shapes(config, settings)
    if not to_authors:
        expected = {to_published(name): shape for name, shape in expected.items()}
    _check_weights(checkpoint, expected, fuser=True)
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
    source: str,
    out: str,
    link: bool = False,
    vision_tower: Optional[str] = None,
    settings: Optional[Mapping[str, Any]] = None,
) -> List[str]:
    """Put a fresh fuser in front of the projector of a released LLaVA: a checkpoint, an adapter or a LoRA folder.

    The result answers bit for bit as the input, because a fresh fuser is the identity; its weights behind the closed
    gates are random and differ between runs. The model's weight files stay as they are, under the names of shards; the
    fuser gets one of its own. In an adapter or LoRA folder it joins the projector in its file.

    Args:
        source: folder to read.
        out: folder to make.
        link: hard-link weight files that stay as they are; they are copied where that is impossible.
        vision_tower: where to read the tower's config; None takes ``mm_vision_tower`` of config.json.
        settings: fields of `MMFuserConfig` to values; those that are absent get their defaults.

    Returns:
        Notes for the user, one per line.

    Raises:
        ValueError: as `convert`; settings that do not fit the tower or the projector; layers with another query than
            the checkpoint's own layer.
        OSError: reading or writing fails.
    """
    check_out(source, out)
    checkpoint = read_checkpoint(source)
    check_format(checkpoint, Format.LLAVA, "upgrade")
    config = dict(checkpoint.config)
    resolved, tower = upgrade_settings(config, dict(settings or {}), vision_tower or config.get("mm_vision_tower"))
    config.update(mm_projector_type=PROJECTOR_TYPE, mm_hidden_size=tower.hidden_size, **resolved.to_llava())
    config["mm_vision_select_layer"] = Layers.parse(
        config["mm_vision_select_layer"]
    ).select_layer  # an int, if it was a text
    _check_weights(checkpoint, projector_shapes(config, resolved), fuser=False)
    fresh = resolved.build(tower.hidden_size, config["hidden_size"]).state_dict()
    link, notes = may_link(link, source, out)
    steps = []
    for label, weights in checkpoint.projectors().items():
        like = next(iter(weights.values()))
        if like.dtype not in DTYPES.values():
            raise ValueError(f"{like.file}: {like.name} is {like.dtype}; only a projector in floating point is allowed")
        prefix = like.name.split(MARK)[0] + MARK + "fuser."
        fuser = {prefix + name: value.to(getattr(torch, like.dtype)) for name, value in fresh.items()}
        if label in checkpoint.adapters:
            steps.append(writing.renamed(checkpoint.path(label), str, fuser))
        else:
            steps += with_new_shard(checkpoint, fuser, link)
    done = {file for file in checkpoint.projectors() if file in checkpoint.adapters}
    steps += [writing.unchanged(checkpoint.path(file), file, link) for file in checkpoint.adapters if file not in done]
    return notes + finish("upgrade", checkpoint, out, steps, config, link)


def upgrade_settings(
    config: Mapping[str, Any], given: Dict[str, Any], name: Optional[str], tower: Optional[Any] = None
) -> Tuple[MMFuserConfig, Any]:
    """The settings with resolved layers, and the tower's config, which is read by its name if it is None."""
    inner = config.get("mm_projector_type", "linear")
    if given.setdefault("projector", inner) != inner:
        raise ValueError(
            f"mm_fuser_projector={given['projector']!r}, but the checkpoint's projector is {inner!r}; drop the flag"
        )
    check_features(config)
    query = Layers.parse(config.get("mm_vision_select_layer"), "config.json: mm_vision_select_layer")
    given["layers"] = Layers.parse_listed(given["layers"], query) if "layers" in given else query
    if not isinstance(name, str):
        raise ValueError("config.json has no mm_vision_tower; give --vision-tower PATH")
    settings = MMFuserConfig(**given)
    settings.refuse_useless(given)
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
    if config.get("mm_hidden_size", tower.hidden_size) != tower.hidden_size:
        raise ValueError(
            f"mm_hidden_size={config['mm_hidden_size']!r} in config.json, but the vision tower {name!r} has width "
            f"{tower.hidden_size}; give the tower that the checkpoint was trained with by --vision-tower"
        )
    own = query[-1] % (tower.num_hidden_layers + 1)
    if settings.layers[-1] != own:
        raise ValueError(
            f"mm_fuser_layers={settings.layers} ends at layer {settings.layers[-1]}, but the "
            f"projector was trained on layer {own} (mm_vision_select_layer={query}); end the list with {own}"
        )
    return settings, tower


def _authors_settings(checkpoint: Checkpoint, settings: MMFuserConfig) -> MMFuserConfig:
    """`settings`, refused unless the authors' code has the same, with their layers as they are written."""
    if settings.layers.name or settings.num_layers != AUTHORS_SETTINGS.num_layers:
        raise ValueError(
            f"{settings.layers.setting}={settings.layers} in {checkpoint.folder}/config.json, but the authors' code "
            f"fuses exactly five listed layers"
        )
    for name in ("fusion", "attention", "self_attention", "num_heads", "num_points"):
        value, allowed = getattr(settings, name), getattr(AUTHORS_SETTINGS, name)
        if value != allowed:
            raise ValueError(
                f"mm_fuser_{name}={value!r} in {checkpoint.folder}/config.json cannot be expressed in the authors' "
                f"format; their code has {allowed!r} only"
            )
    check_layers(checkpoint.config, settings)
    return settings


def check_format(checkpoint: Checkpoint, wanted: Format, command: str) -> None:
    folder, found = checkpoint.folder, checkpoint.format()
    if found == wanted:
        return
    back = f" --to authors {folder} OUT writes the authors'" if command == "convert" else ""
    kind = checkpoint.config.get("mm_projector_type", "linear")
    messages = {
        Format.OURS: "in the format of llava_mmfuser already, with a fuser; nothing is to be done"
        + (f" (python -m llava_mmfuser convert{back})" if back else ""),
        Format.AUTHORS: "in the authors' format already; nothing is to be done"
        if wanted is Format.OURS and command == "convert"
        else convert_hint(folder),
        Format.LLAVA: f"plain LLaVA (mm_projector_type={kind!r}) without a fuser; put a fresh one in front with: "
        f"python -m llava_mmfuser upgrade {folder} OUT",
        Format.NATIVE: native_hint(folder),
        Format.OTHER: "not a LLaVA checkpoint: its config.json has neither mm_vision_tower nor mm_projector_type",
    }
    raise ValueError(f"{folder} is {messages[found]}")


def _check_weights(checkpoint: Checkpoint, expected: Shapes, fuser: bool) -> None:
    """Refuse projector weights other than `expected`, of which those of the fuser count only if `fuser`."""
    projectors = checkpoint.projectors()
    if not projectors:
        raise ValueError(
            f"{checkpoint.folder} has no weights of a projector: no name with {MARK!r} in "
            f"{', '.join(checkpoint.shards + checkpoint.adapters)}"
        )
    if checkpoint.shards and MODEL not in projectors:
        raise ValueError(f"{checkpoint.folder}: {MODEL} has no projector, though {' and '.join(projectors)} has one")
    for label, weights in projectors.items():
        problems = compare({name: weight.shape for name, weight in weights.items()}, expected)
        if fuser and not problems and not set(expected) <= set(weights):
            problems = "no weights of a fuser"
        if problems:
            raise ValueError(f"{checkpoint.folder}, {label}: weights do not fit config.json: {problems}")


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
    stem, ending = (
        ("model", ".safetensors") if checkpoint.shards[0].endswith(".safetensors") else ("pytorch_model", ".bin")
    )
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
    old_size = old["metadata"].get("total_size", sum(os.path.getsize(checkpoint.path(f)) for f in checkpoint.shards))
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
