"""Resolves a training run: from its arguments, its vision tower and the checkpoint that it starts from.

This happens when the model is built. If the arguments come from a parser, it happens after parsing, too, so that
mistakes fail before a weight is read.
"""

import contextlib
import dataclasses
import os
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence

import torch

from ..block.kinds import FUSIONS, refuse_open
from ..checkpoints.adapter import match_adapter, read_adapter
from ..checkpoints.files import read_config
from ..checkpoints.folder import FULL, folder_kind
from ..checkpoints.verdict import other_setting
from ..config import PROJECTOR_TYPE, MMFuserConfig, explicit_settings
from ..layers import spell
from ..names import Shapes, expected_shapes
from ..patching import folder_of, is_replaced
from ..towers import TowerConfig, check_features, check_name, tower_config
from . import next as llava_next
from .optimizer import RATES, UNTRAINED, parse_rate

HOST_CLASSES = {"CLIP": "CLIPVisionTower", "SigLIP": "SigLipVisionTower"}  # kind of tower -> LLaVA's class


class _Last:
    """The last `TrainingArguments` of this process; a fresh fuser takes their seed."""

    training_args: Any = None


def training_arguments_init(original, self):
    original(self)
    _Last.training_args = self


def seed() -> Optional[int]:
    """The run's seed, or None without `TrainingArguments`."""
    return getattr(_Last.training_args, "seed", None)


def check_arguments(arguments: Any, given_flags: Sequence[str] = ()) -> None:
    """Refuse wrong settings of `ModelArguments` before any weight is read.

    Args:
        arguments: `ModelArguments`, with the ``mm_fuser_*`` settings that the user gave.
        given_flags: the settings that a parser was given for the fuser.

    Raises:
        ValueError: see `MMFuserConfig`; or another ``mm_projector_type`` got settings of the fuser.
    """
    for name in RATES:
        parse_rate(name, getattr(arguments, name, None))
    if arguments.mm_projector_type != PROJECTOR_TYPE:
        if given_flags:
            raise ValueError(
                f"{', '.join(given_flags)} was given, which needs mm_projector_type={PROJECTOR_TYPE}, but it is "
                f"{arguments.mm_projector_type!r}; add --mm_projector_type {PROJECTOR_TYPE} or drop the setting"
            )
        return
    given, settings = explicit_settings(arguments), MMFuserConfig.from_llava(arguments)
    if {"fusion", "attention"} & set(given):  # else a checkpoint may set them
        settings.refuse_useless(given)
        refuse_together(settings.fusion, arguments)
    select_layer = arguments.mm_vision_select_layer
    if "layers" in given and isinstance(select_layer, tuple) and select_layer != given["layers"]:
        raise ValueError(
            f"mm_fuser_layers={spell(given['layers'])} and mm_vision_select_layer={spell(select_layer)} "
            f"name different layers; give one of them"
        )


class Run(NamedTuple):
    """A resolved run."""

    settings: MMFuserConfig  # with explicit layers
    tower: TowerConfig
    start: Mapping[str, Any]  # config.json of the first checkpoint; empty if it is not on this machine
    adapter: Optional[Dict[str, torch.Tensor]]  # with our names
    shapes: Optional[Shapes]  # the projector's shapes, checked against the adapter; None means unknown


def resolve_run(model_args: Any, start: Mapping[str, Any]) -> Run:
    """Resolve the flags. Of all weights, only an adapter's are read.

    Args:
        model_args: `ModelArguments` with ``mm_projector_type=mmfuser``. They or `start` name a vision tower.
        start: config.json of the checkpoint that the run starts from.

    Raises:
        ValueError: a setting does not fit the tower, differs from the checkpoint's or has no effect; or the adapter
            cannot be read or does not fit.
    """
    check_features(model_args)
    tower = _host_tower(start.get("mm_vision_tower") or model_args.vision_tower)
    check_features(model_args, tower.kind)
    given = explicit_settings(model_args)
    if start.get("mm_projector_type") == PROJECTOR_TYPE:
        settings = _kept_settings(start, tower, given)
    else:
        settings = MMFuserConfig.from_llava(model_args).resolve(tower)
        if start.get("mm_vision_tower") is not None:
            settings = _existing_projector_settings(start, given, settings)
    settings.refuse_useless(given)
    refuse_together(settings.fusion, model_args)
    path, adapter, shapes = getattr(model_args, "pretrain_mm_mlp_adapter", None), None, None
    if path is not None:
        if isinstance(start.get("hidden_size"), int):
            shapes = expected_shapes(settings, tower.hidden_size, start["hidden_size"])
        try:
            adapter = match_adapter(path, read_adapter(path), settings, shapes, tower)
        except ValueError as error:
            raise ValueError(f"pretrain_mm_mlp_adapter={error}") from error
    trained_without = start.get("mm_vision_tower") and start.get("mm_projector_type") != PROJECTOR_TYPE
    if (trained_without or adapter) and not any(name.startswith("fuser.") for name in adapter or ()):
        refuse_open(settings.start, path or "the checkpoint's")
    return Run(settings, tower, start, adapter, shapes)


def refuse_together(fusion: str, model_args: Any) -> None:
    """Raise ValueError for `ModelArguments` that do not work with this fusion."""
    for name in RATES:
        lr = getattr(model_args, name, None)
        if lr is not None and not FUSIONS[fusion].has_weights:
            raise ValueError(f"{name}={lr} has no effect with mm_fuser_fusion={fusion}, which has no weights")
    if fusion != "token_concat":
        return
    merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
    if merge_type != "flat":
        raise ValueError(
            f"mm_patch_merge_type={merge_type} together with mm_fuser_fusion=token_concat is not supported, "
            f"because its tokens are no single map; use flat"
        )
    llava_next.refuse_token_concat(model_args)


def _host_tower(name: str) -> TowerConfig:
    """The config of a vision tower; raises ValueError if the installed LLaVA cannot read the tower."""
    tower = tower_config(name)
    check_name(name, tower.kind)
    if not is_replaced(HOST_CLASSES[tower.kind] + ".__init__"):
        raise ValueError(
            f"vision_tower={name!r} is a {tower.kind} tower, which this LLaVA ({folder_of('llava')}) does not have; "
            f"use LLaVA-NeXT (a commit with {HOST_CLASSES[tower.kind]}), or a CLIP tower"
        )
    return tower


def check_run(model_args: Any, training_args: Any) -> None:
    """Check a run before any weight but an adapter's is read.

    Args:
        model_args: LLaVA's `ModelArguments`.
        training_args: `TrainingArguments` or None.

    Raises:
        ValueError: see `resolve_run`; or train.py would lose a checkpoint's fuser, a fresh fuser would stay frozen, or
            ``output_dir`` has a checkpoint that the run cannot resume.
    """
    path = getattr(model_args, "model_name_or_path", None)
    start = {} if path is None else _config_at(path)
    wanted, run = model_args.mm_projector_type == PROJECTOR_TYPE, None
    if path is not None and start.get("mm_projector_type") == PROJECTOR_TYPE:
        if os.path.isdir(path) and folder_kind(path) != FULL:
            raise ValueError(
                f"model_name_or_path={path} is {folder_kind(path)}, and train.py reads no fuser from it; "
                f"LoRA has to be merged first, and an adapter goes to --pretrain_mm_mlp_adapter"
            )
        if model_args.vision_tower is None:
            raise ValueError(
                f"model_name_or_path={path} has a fuser, but without --vision_tower train.py leaves it and the MLP "
                f"out; add --vision_tower {start.get('mm_vision_tower')}"
            )
        if not wanted:
            raise ValueError(other_type(model_args))
    if model_args.vision_tower is None:
        return
    if wanted:
        run = resolve_run(model_args, start)
        _check_trained(run, model_args, training_args)
    if training_args is not None:
        _check_output_dir(model_args, training_args, run)


def _check_trained(run: Run, model_args: Any, training_args: Any) -> None:
    """Refuse to freeze a fuser without trained weights. A run without a known start passes."""
    known = bool(run.start) and run.start.get("mm_projector_type") != PROJECTOR_TYPE
    brought = any(name.startswith("fuser.") for name in run.adapter or ())
    fresh = known and not brought and FUSIONS[run.settings.fusion].has_weights
    frozen_by = _frozen_by(model_args, training_args)
    if fresh and frozen_by is not None:
        raise ValueError(f"{frozen_by}, but {UNTRAINED}")


def _frozen_by(model_args: Any, training_args: Any) -> Optional[str]:
    """The setting that freezes the projector, or None."""
    parts = llava_next.tunable_parts(model_args)
    if parts is not None:
        return None if llava_next.ADAPTER_PART in parts else f"mm_tunable_parts={','.join(parts)}"
    return "freeze_mm_mlp_adapter=True" if getattr(training_args, "freeze_mm_mlp_adapter", False) else None


def _config_at(path: str) -> Dict[str, Any]:
    """config.json of a folder, or of a name on the hub from the cache; empty if there is none."""
    from transformers.utils import cached_file

    with contextlib.suppress(OSError):
        return read_config(os.path.dirname(cached_file(path, "config.json", local_files_only=True))) or {}
    return {}


def _check_output_dir(model_args: Any, training_args: Any, run: Optional[Run]) -> None:
    """Refuse a checkpoint in output_dir that this run cannot resume; `run` is None without a fuser."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = training_args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    config = read_config(last) if last else None
    lora = last is not None and os.path.isfile(os.path.join(last, "adapter_config.json"))
    fused = config is not None and config.get("mm_projector_type") == PROJECTOR_TYPE
    if (config is None and not lora) or (run is None and not fused):
        return
    config = config or {"mm_projector_type": "one without a fuser"}  # LLaVA's LoRA checkpoints have none
    # A user's script may call PEFT without LLaVA's flag.
    was = dict(mm_projector_type=config.get("mm_projector_type"), lora_enable=lora)
    now = dict(mm_projector_type=model_args.mm_projector_type)
    now["lora_enable"] = getattr(training_args, "lora_enable", False) or lora
    was["tune_mm_mlp_adapter"] = bool(config.get("tune_mm_mlp_adapter"))
    now["tune_mm_mlp_adapter"] = getattr(model_args, "tune_mm_mlp_adapter", False)
    was["mm_tunable_parts"] = config.get("mm_tunable_parts")
    now["mm_tunable_parts"] = getattr(model_args, "mm_tunable_parts", None)
    if fused and run is not None:
        before = MMFuserConfig.from_llava(config).resolve(run.tower)
        changed = other_setting(before, run.settings)
        if changed is not None:
            was[changed[0]], now[changed[0]] = changed[1:]
    setting = next((name for name in was if was[name] != now[name]), None)
    if setting is not None:
        raise ValueError(
            f"output_dir={folder}: {last}, from which train.py resumes by itself, was trained with "
            f"{setting}={spell(was[setting])}, but this run has {spell(now[setting])}; choose another output_dir, move "
            f"its checkpoint-* away, or resume with the flags of the interrupted run"
        )


def other_type(model_args: Any) -> str:
    return (
        f"mm_projector_type={model_args.mm_projector_type!r}, but the checkpoint has a fuser "
        f"(mm_projector_type={PROJECTOR_TYPE!r} in its config.json); write --mm_projector_type {PROJECTOR_TYPE}"
    )


def _kept_settings(start: Mapping[str, Any], tower: Any, given: Dict[str, Any]) -> MMFuserConfig:
    """The checkpoint's settings. Flags may repeat them, but not change them."""
    kept = MMFuserConfig.from_llava(start).resolve(tower)
    if "layers" in given:
        given = {**given, "layers": given["layers"].resolve(tower.num_hidden_layers, tower.num_deleted)}
    for name, value in given.items():
        if value != getattr(kept, name):
            raise ValueError(
                f"mm_fuser_{name}={spell(value)}, but the checkpoint was trained with {spell(getattr(kept, name))}; "
                f"drop the flag, or start from a checkpoint without a fuser"
            )
    return kept


def _existing_projector_settings(
    start: Mapping[str, Any], given: Dict[str, Any], settings: MMFuserConfig
) -> MMFuserConfig:
    existing = start.get("mm_projector_type") or "linear"
    if given.get("projector", existing) != existing:
        raise ValueError(
            f"mm_fuser_projector={given['projector']!r}, but the checkpoint's projector is {existing!r}; drop the flag"
        )
    return dataclasses.replace(settings, projector=existing)
