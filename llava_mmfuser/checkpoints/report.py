"""`inspect`: what a checkpoint folder or an adapter file holds, and whether it loads."""

import dataclasses
import os
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from ..config import FLAG_PREFIX
from ..layers import spell
from ..names import MARK, describe, is_fused, is_published, to_published
from ..towers import local_tower
from .files import DTYPES, Weight, read_config, read_weights
from .folder import LORA, Checkpoint, folder_kind, read_checkpoint
from .verdict import ADAPTER, INSPECT, judge, settings_of

NAME_NOTE = "note: LLaVA goes by the name"


def inspect(path: str) -> Tuple[List[str], Optional[str]]:
    """Lines that say what a checkpoint folder or an adapter file holds; the reason why it does not load, or None."""
    if not (os.path.isfile(path) or os.path.isdir(path)):  # reading a device may never end
        raise ValueError(f"{path} is neither a file nor a folder on this machine")
    lines = [f"path: {path}"]
    try:
        for line in _lines(path):
            lines.append(line)
    except ValueError as error:
        return lines, str(error)
    return lines, None


def _lines(path: str) -> Iterator[str]:
    """Raises ValueError where it finds why the checkpoint does not load."""
    lone = os.path.isfile(path)
    folder, file = os.path.split(os.path.abspath(path)) if lone else (path, "")
    config = read_config(folder)
    if config is not None:
        yield from _setting_lines(config)
    if lone:
        checkpoint = Checkpoint(folder, config or {}, {file: read_weights(folder, file)}, adapters=[file])
    else:
        checkpoint = read_checkpoint(folder)
    names = [weight.name for weights in checkpoint.weights.values() for weight in weights]
    lora = next((file for file in LORA if file in checkpoint.others), None)
    names += [weight.name for weight in read_weights(folder, lora)] if lora else []
    kind, format = describe(names), checkpoint.format()
    yield f"type: {kind}" if lone else f"type: {folder_kind(folder).partition(' ')[2]} ({kind}), {format.value}"
    for weights in checkpoint.projectors().values():
        yield from _weight_lines(weights)
    if checkpoint.left_out:
        yield f"not looked at: {', '.join(checkpoint.left_out)}"
    if lone and kind.startswith(("weights of a whole model", "LoRA weights")):
        raise ValueError(f"{file} is a part of a checkpoint, not an adapter; inspect its folder: {folder}")
    if lone and any(map(is_published, checkpoint.projectors().values())):
        yield "note: the authors' names; --pretrain_mm_mlp_adapter translates them"
    if config is None and not checkpoint.projectors():
        raise ValueError(f"{file} has no weights of a projector (no name with {MARK!r})")
    if config is None:
        yield "note: no config.json beside it, so its settings are unknown and its shapes were not compared"
        return
    verdict = judge(checkpoint, ADAPTER if lone else INSPECT, local_tower(config))
    yield from (f"note: {note}" for note in verdict.notes)
    verdict.check()


def _setting_lines(config: Dict[str, Any]) -> Iterator[str]:
    shown = {key: value for key, value in config.items() if key.startswith("mm_") or key == "hidden_size"}
    if is_fused(config):
        settings = settings_of(config)
        yield f"layers: {settings.layers}"
        fuser = {FLAG_PREFIX + f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        shown = {**fuser, **shown}
    for key in sorted(shown):
        yield f"{key}: {spell(shown[key])}"


def _weight_lines(weights: Mapping[str, Weight]) -> Iterator[str]:
    """Which file holds what part of a projector, and how far the gates are open."""
    published = is_published(weights)
    parts: Dict[Tuple[str, str], List[Weight]] = {}
    for name, weight in weights.items():
        fuser = name.startswith("0." if published else "fuser.")
        parts.setdefault((weight.file, "fuser" if fuser else "MLP"), []).append(weight)
    for (file, part), found in sorted(parts.items()):
        yield f"weights: {file}: {part}, {len(found)} tensors ({', '.join(sorted({w.dtype for w in found}))})"
    for side in ("cross", "self"):
        name = f"fuser.{side}_gate.scale"
        gate = weights.get(to_published(name) if published else name)
        if gate is not None and gate.dtype in DTYPES.values() and gate.shape != (0,):
            size = gate.read().float().abs()
            yield f"{side} gate: mean |g| {size.mean():.4g}, max |g| {size.max():.4g}"
