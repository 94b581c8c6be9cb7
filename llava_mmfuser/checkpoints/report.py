"""`inspect`: what a checkpoint folder or an adapter file holds, and whether it loads."""

import dataclasses
import os
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from ..block.kinds import FUSIONS
from ..config import FLAG_PREFIX
from ..layers import spell
from ..names import (
    MARK,
    Format,
    convert_hint,
    describe,
    from_published,
    is_fused,
    is_published,
    native_hint,
    to_published,
)
from ..towers import check_features, check_tower_is_there, local_tower
from .files import Weight, projector_weights, read_config, read_header, read_tensor, read_weights
from .fit import check_layers, check_tower, misfit, settings_of
from .folder import LORA, MIXED, folder_kind, name_from_path, name_problem, read_checkpoint

NAME_NOTE = "note: LLaVA goes by the name"


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
    format = checkpoint.format()
    yield f"type: {kind.partition(' ')[2]} ({describe(names)}), {format.value}"
    for weights in checkpoint.projectors().values():
        yield from _weight_lines(folder, weights)
    if checkpoint.left_out:
        yield f"not looked at: {', '.join(checkpoint.left_out)}"
    if format is Format.OTHER:
        raise ValueError(
            "config.json has neither mm_vision_tower nor mm_projector_type, so this is no LLaVA checkpoint"
        )
    if format is Format.NATIVE:
        raise ValueError(f"it is {native_hint(folder)}")
    if format is Format.AUTHORS:
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
    check_tower_is_there(checkpoint.config)
    problem = name_problem(name_from_path(folder), kind, checkpoint.config)
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
    if is_fused(config):
        settings = settings_of(config)
        yield f"layers: {settings.layers}"
        fuser = {FLAG_PREFIX + f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
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
    fused = is_fused(config)
    tower = local_tower(config)
    if fused and not check_layers(config, settings):
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
        check_features(config, None if tower is None else tower.kind)
        if tower is not None:
            check_tower(config, tower)
