"""Everything this package does to LLaVA, as one table (`PATCHES`), and nothing else names LLaVA's symbols.

Not patched, because upstream selects on the substring ``mm_projector`` or on attributes that stay as they are: train.py
and its saving, LoRA and quantisation code, the evaluation and serving scripts.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import trainer
from .checkpoint import (
    convert_hint,
    is_authors_config,
    matching_adapter,
    missing_fuser_keys,
    read_adapter,
    read_config,
)
from .config import (
    FUSIONS,
    FUSIONS_WITHOUT_WEIGHTS,
    PROJECTOR_TYPE,
    MMFuserConfig,
    check_arguments,
    explicit_settings,
    layers_setting,
    resolve_layers,
    with_fuser_flags,
)
from .inspection import projector_shapes, tower_config
from .ops import select_implementation
from .patching import Patch, check_row, replace, restore
from .projector import MMFuserProjector
from .resettable import Resettable, materialize
from .vision import SELECT_FEATURES, return_layers

logger = logging.getLogger("llava_mmfuser")


def _tower_init(original, self, vision_tower, args, delay_load=False):
    if getattr(args, "mm_projector_type", None) != PROJECTOR_TYPE:
        _refuse_layer_list(args)
        return original(self, vision_tower, args, delay_load=delay_load)
    _refuse_s2(self)
    settings = _resolve(args, vision_tower)
    original(self, vision_tower, args, delay_load=delay_load)
    return_layers(self, settings.layers)


def _build_vision_projector(original, config, delay_load=False, **kwargs):
    if getattr(config, "mm_projector_type", "linear") != PROJECTOR_TYPE:
        return original(config, delay_load=delay_load, **kwargs)
    settings = MMFuserConfig.from_llava(config)
    inner_config = copy.copy(config)
    inner_config.mm_projector_type = settings.projector
    # The inner projector first: it gets the same initial weights as in a run without the fuser.
    inner = original(inner_config, delay_load=delay_load, **kwargs)
    return MMFuserProjector.build(settings, config.mm_hidden_size, inner)


def _initialize_vision_modules(original, self, model_args, fsdp=None):
    projector = getattr(self, "mm_projector", None)
    wanted = getattr(model_args, "mm_projector_type", "linear") == PROJECTOR_TYPE
    fused = isinstance(projector, MMFuserProjector)
    if not wanted:
        if fused:
            raise ValueError(
                f"mm_projector_type={model_args.mm_projector_type!r}, but the checkpoint has a fuser "
                f"(mm_projector_type={PROJECTOR_TYPE!r} in its config.json); write --mm_projector_type {PROJECTOR_TYPE}"
            )
        _refuse_layer_list(model_args)
        return original(self, model_args, fsdp=fsdp)

    if fsdp:
        raise ValueError(
            f"fsdp={fsdp} together with mm_projector_type={PROJECTOR_TYPE} is not supported; use DeepSpeed instead"
        )
    _check_trainer(model_args)
    tower = self.get_vision_tower()
    if fused:
        settings, source = _kept_settings(self, model_args), "the checkpoint"
    else:
        settings, source = _resolve(model_args, tower.vision_tower_name if tower else model_args.vision_tower), None
        if projector is not None:
            settings = _existing_projector_settings(self.config, model_args, settings)
    settings.refuse_useless(explicit_settings(model_args), model_args)
    adapter, model_args = model_args.pretrain_mm_mlp_adapter, copy.copy(model_args)
    model_args.pretrain_mm_mlp_adapter = None
    if projector is not None and not fused:
        self.mm_projector = _put_fuser_in_front(projector, settings, tower)
    self.config.update(settings.to_llava())
    self.config.mm_fuser_lr = getattr(model_args, "mm_fuser_lr", None)  # as upstream keeps mm_projector_lr
    original(self, model_args, fsdp=fsdp)
    self.mm_projector.lr = self.config.mm_fuser_lr
    self.mm_projector.log_gates = getattr(model_args, "mm_fuser_log_gates", True)
    query = model_args.mm_vision_select_layer
    vision_config = self.get_vision_tower().config
    if not isinstance(query, int) or query % (vision_config.num_hidden_layers + 1) != settings.layers[-1]:
        self.config.mm_vision_select_layer = settings.layers[-1]
    if adapter is not None:
        weights = matching_adapter(adapter, settings, self.mm_projector.shapes(), vision_config)
        with trainer.gathered(self.mm_projector.parameters(), modifier_rank=0):
            self.mm_projector.load_state_dict(weights)
        source = adapter if self.mm_projector.num_loaded or settings.fusion in FUSIONS_WITHOUT_WEIGHTS else source
    _report(self.mm_projector, settings, source)


def _initialize_weights(original, self, module, *args, **kwargs):
    """Parameters that a checkpoint lacked, and models made without one: the fuser's modules know their own values."""
    if isinstance(module, Resettable) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        module._is_hf_initialized = True
    else:
        original(self, module, *args, **kwargs)


def _load_pretrained_weights(original, *args, **kwargs):
    loaded = original(*args, **kwargs)
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    for projector in given["model"].modules():
        if isinstance(projector, MMFuserProjector):
            # With low_cpu_mem_usage=True and no device_map, transformers 4.37 takes missing tensors of equal size for
            # tied ones and leaves them on the meta device.
            materialize(projector)
            settings = MMFuserConfig.from_llava(given["model"].config)
            missing = missing_fuser_keys(given["loaded_keys"], projector)
            _report(projector, settings, given["pretrained_model_name_or_path"], missing)
    return loaded


def _parser_init(original, self, dataclass_types, *args, **kwargs):
    single = dataclasses.is_dataclass(dataclass_types)
    extended = [_with_flags(kind) for kind in ([dataclass_types] if single else dataclass_types)]
    original(self, extended[0] if single else extended, *args, **kwargs)


def _load_llava(original, model_path, model_base, model_name, *args, **kwargs):
    _check_checkpoint(model_path, model_base, model_name)
    return original(model_path, model_base, model_name, *args, **kwargs)


_CLIP_ENCODER = "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower"
_TRAINER = "transformers.trainer:Trainer"
_MODEL_PATCHES = (
    Patch(
        _CLIP_ENCODER + ".__init__",
        _tower_init,
        ("self", "vision_tower", "args", "delay_load"),
        "checks and resolves the layers before the tower's weights are read",
    ),
    Patch(
        _CLIP_ENCODER + ".feature_select",
        None,
        ("self", "image_forward_outs"),
        "not replaced, but a tower with a fuser gives it several layers",
    ),
    Patch(
        _CLIP_ENCODER + ".forward",
        None,
        ("self", "images"),
        "not replaced, but a tower with a fuser runs it with its own answer to `self.vision_tower(…)`",
    ),
    Patch(
        "llava.model.multimodal_projector.builder:build_vision_projector",
        _build_vision_projector,
        ("config", "delay_load", "kwargs"),
        "knows mm_projector_type=mmfuser",
    ),
    Patch(
        "llava.model.llava_arch:build_vision_projector",
        _build_vision_projector,
        ("config", "delay_load", "kwargs"),
        "the same function under the name llava_arch imported",
    ),
    Patch(
        "llava.model.llava_arch:LlavaMetaModel.initialize_vision_modules",
        _initialize_vision_modules,
        ("self", "model_args", "fsdp"),
        "an existing projector gets the fuser in front; config.json tells the truth",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel._initialize_weights",
        _initialize_weights,
        ("self", "module"),
        "fuser weights missing from a checkpoint start as identity",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel._load_pretrained_model",
        _load_pretrained_weights,
        ("model", "state_dict", "loaded_keys", "resolved_archive_file", "pretrained_model_name_or_path"),
        "says where the fuser's weights came from",
    ),
    Patch(
        "transformers.hf_argparser:HfArgumentParser.__init__",
        _parser_init,
        ("self", "dataclass_types"),
        "the mm_fuser_* flags, and lists in mm_vision_select_layer",
    ),
    Patch(
        "transformers.models.clip.modeling_clip:CLIPEncoderLayer.forward",
        None,
        ("self", "hidden_states", "attention_mask", "causal_attention_mask"),
        "not replaced, but its blocks are called one by one",
    ),
)

_LOADER_PATCHES = (
    Patch(
        "llava.model.builder:load_pretrained_model",
        _load_llava,
        ("model_path", "model_base", "model_name"),
        "adapters and checkpoints are checked before the language model is read",
    ),
)
_TRAINER_PATCHES = (
    Patch(
        "llava.train.llava_trainer:LLaVATrainer.create_optimizer",
        trainer.create_optimizer,
        ("self",),
        "mm_fuser_lr; gates, norms and biases of the fuser without weight decay",
    ),
    Patch(
        "llava.train.llava_trainer:LLaVATrainer._save_checkpoint",
        trainer.save_checkpoint,
        ("self", "model", "trial", "metrics"),
        "stage 1 saves what resuming needs",
    ),
    Patch(
        _TRAINER + ".save_model",
        trainer.save_model,
        ("self", "output_dir", "_internal_call"),
        "checkpoints of stage 1 and of LoRA hold the projector",
    ),
    Patch(
        _TRAINER + "._load_from_checkpoint",
        trainer.load_from_checkpoint,
        ("self", "resume_from_checkpoint", "model"),
        "resuming stage 1 or LoRA restores the projector",
    ),
    Patch(
        "transformers.trainer:deepspeed_load_checkpoint",
        trainer.deepspeed_load_checkpoint,
        ("deepspeed_engine", "checkpoint_path"),
        "resuming stage 1 or LoRA under DeepSpeed, whose checkpoints leave out frozen weights",
    ),
    Patch(
        "transformers.trainer:deepspeed_init",
        trainer.deepspeed_init,
        ("trainer", "num_training_steps"),
        "refuses mm_fuser_lr where DeepSpeed's own optimizer would ignore it",
    ),
    Patch(
        _TRAINER + ".log",
        trainer.log,
        ("self", "logs"),
        "the gates beside the loss",
    ),
)
# Module of LLaVA -> what is patched right after its import.
PATCHES = {
    "llava.model.llava_arch": _MODEL_PATCHES,
    "llava.model.builder": _LOADER_PATCHES,
    "llava.train.llava_trainer": _TRAINER_PATCHES,
}
_ESSENTIAL = "llava.model.llava_arch"

_applied: Dict[str, Optional[str]] = {}  # module -> None, or why its rows were not applied


def apply(module: str) -> None:
    """Check the rows of `PATCHES` for one module, then apply all of them, or none: what has drifted is left alone.

    In that case stderr says why. If it is `llava_arch`, ``mm_projector_type=mmfuser`` raises the same reason and the
    other modules are left alone, too; if it is `llava_trainer`, ``mm_fuser_lr`` raises it. Idempotent.
    """
    if module in _applied or _applied.get(_ESSENTIAL):
        return
    _log_to_stderr()
    problems = [f"{row.target}: {detail}" for row, state, detail in check(module) if state != "ok"]
    rows = [row for row in PATCHES[module] if row.replacement is not None]
    if not problems:
        try:
            for row in rows:
                replace(row.target, row.replacement)
        except Exception as error:
            restore(row.target for row in rows)
            problems = [f"{type(error).__name__}: {error}"]
    if not problems:
        _applied[module] = None
        return
    _applied[module] = (
        f"llava_mmfuser does not fit this LLaVA ({_path_of('llava')}), whose {module} is left unpatched: "
        f"{'; '.join(problems)}. `python -m llava_mmfuser status` shows every row; "
        f"use LLaVA 1.2.2.post1 or main, or report the change."
    )
    sys.stderr.write(f"{_applied[module]}\n")
    if module == _ESSENTIAL:
        _refuse_mmfuser(_applied[module])


def revert() -> None:
    """Put every original back."""
    restore()
    _applied.clear()


def check(module: Optional[str] = None) -> List[Tuple[Patch, str, str]]:
    """Each row, or those of one module, with its state, ``ok``, ``missing`` or ``changed``, and what was found."""
    found = [(row, *check_row(row)) for name, rows in PATCHES.items() if module in (None, name) for row in rows]
    if _applied.get(_ESSENTIAL):
        found = [(row, state, "refuses mmfuser" if detail == "patched" else detail) for row, state, detail in found]
    return found


def status() -> Dict[str, Any]:
    """What is installed and patched. Imports LLaVA.

    Returns:
        ``active`` (bool), ``reason`` (why not, or None), ``llava`` (its folder, or None), ``versions`` (package to
        version or None), ``targets`` (list of target, state, detail), ``implementations`` (device to name).
    """
    reasons = []
    for module in PATCHES:
        try:
            importlib.import_module(module)
            reasons.append(_applied.get(module, "the hook is off; call llava_mmfuser.activate()"))
        except Exception as error:
            reasons.append(f"LLaVA cannot be imported: {type(error).__name__}: {error}")
    reason = next(filter(None, reasons), None)
    return {
        "active": reason is None,
        "reason": reason,
        "llava": _path_of("llava"),
        "versions": {
            name: _version_of(name)
            for name in (
                "llava_mmfuser",
                "llava",
                "llava-torch",
                "torch",
                "transformers",
                "deepspeed",
                "flash-attn",
                "triton",
            )
        },
        "targets": [(row.target, state, detail) for row, state, detail in check()],
        "implementations": {device: _implementation(device) for device in ("cpu", "cuda")},
    }


def _implementation(device: str) -> str:
    try:
        return select_implementation(device)
    except ValueError as error:
        return str(error)


def _refuse_mmfuser(reason: str) -> None:
    """Make everything of LLaVA that still exists and reads ``mm_projector_type`` raise the reason for ``mmfuser``."""

    def refuse(original, *args, **kwargs):
        if any(getattr(value, "mm_projector_type", None) == PROJECTOR_TYPE for value in (*args, *kwargs.values())):
            raise RuntimeError(reason)
        return original(*args, **kwargs)

    for row in _MODEL_PATCHES:
        reads_type = row.replacement in (_tower_init, _build_vision_projector, _initialize_vision_modules)
        if reads_type and check_row(row)[0] != "missing":
            replace(row.target, refuse)


def _resolve(args: Any, vision_tower: str) -> MMFuserConfig:
    """The settings in `args`, checked against the tower's config, which is read without its weights."""
    _refuse_s2(args)
    vision_config = tower_config(vision_tower)
    select_feature = getattr(args, "mm_vision_select_feature", SELECT_FEATURES[0])
    if select_feature not in SELECT_FEATURES:
        allowed = " or ".join(SELECT_FEATURES)
        raise ValueError(f"mm_vision_select_feature={select_feature!r} is not allowed; use {allowed}")
    return MMFuserConfig.from_llava(args).resolve(vision_config, layers_setting(args))


@functools.lru_cache(maxsize=None)
def _with_flags(arguments: type) -> type:
    """LLaVA's `ModelArguments`, known by its fields because train.py defines it in ``__main__``, with our flags."""
    names = {f.name for f in dataclasses.fields(arguments)}
    if not {"mm_projector_type", "mm_vision_select_layer", "vision_tower"} <= names:
        return arguments
    return with_fuser_flags(arguments, _check_arguments)


def _check_arguments(arguments: Any) -> None:
    check_arguments(arguments)
    if arguments.mm_projector_type == PROJECTOR_TYPE:
        if arguments.vision_tower is not None:
            _resolve(arguments, arguments.vision_tower)
        if getattr(arguments, "pretrain_mm_mlp_adapter", None) is not None:
            try:
                read_adapter(arguments.pretrain_mm_mlp_adapter)
            except ValueError as error:
                raise ValueError(f"pretrain_mm_mlp_adapter={error}") from error


def _refuse_s2(found: Any) -> None:
    """Refuse arguments that ask for several scales, and a tower that has them: its features are wider by as much."""
    if getattr(found, "s2", False) or hasattr(found, "forward_feature"):
        raise ValueError(f"s2=True together with mm_projector_type={PROJECTOR_TYPE} is not supported; set s2 to False")


def _refuse_layer_list(args: Any) -> None:
    if is_authors_config(args):
        raise ValueError(
            f"mm_vision_select_layer={list(args.mm_vision_select_layer)} is a list, which needs "
            f"mm_projector_type={PROJECTOR_TYPE}, but it is {getattr(args, 'mm_projector_type', None)!r}; in a "
            f"config.json this means {convert_hint(getattr(args, '_name_or_path', None) or 'IN')}"
        )


def _check_checkpoint(model_path: str, model_base: Optional[str], model_name: str) -> None:
    """Refuse what `load_pretrained_model` would load silently wrong: the authors' format, adapters that do not fit."""
    from transformers.utils import cached_file

    def find(name: str) -> Optional[str]:
        with contextlib.suppress(OSError):  # upstream's own loading says what it misses
            return cached_file(model_path, name)
        return None

    file = find("config.json")
    config = read_config(os.path.dirname(file)) if file else None
    if config and is_authors_config(config):
        _refuse_layer_list(SimpleNamespace(**{**config, "_name_or_path": model_path}))
    if not config or config.get("mm_projector_type") != PROJECTOR_TYPE or model_base is None:
        return
    is_lora = "lora" in model_name.lower()
    adapter = find("non_lora_trainables.bin" if is_lora else "mm_projector.bin")
    if adapter is not None:
        settings = MMFuserConfig.from_llava(config)
        matching_adapter(adapter, settings, projector_shapes(config, settings), optional=is_lora)


def _kept_settings(model: Any, model_args: Any) -> MMFuserConfig:
    """The checkpoint's own settings; the script may repeat them, not change them."""
    kept = MMFuserConfig.from_llava(model.config).resolve(model.get_vision_tower().config)
    given = explicit_settings(model_args)
    if "layers" in given:
        given["layers"] = resolve_layers(
            given["layers"], model.get_vision_tower().config.num_hidden_layers, layers_setting(model_args)
        )
    for name, value in given.items():
        if value != getattr(kept, name):
            raise ValueError(
                f"mm_fuser_{name}={value!r}, but the checkpoint was trained with {getattr(kept, name)!r}; "
                f"drop the flag, or start from a checkpoint without a fuser"
            )
    return kept


def _check_trainer(model_args: Any) -> None:
    lr = getattr(model_args, "mm_fuser_lr", None)
    refusal = _applied.get(
        "llava.train.llava_trainer",
        "it needs LLaVATrainer, which has not been imported; train with it or drop the flag",
    )
    if lr is not None and refusal is not None:
        raise ValueError(f"mm_fuser_lr={lr}: {refusal}")


def _existing_projector_settings(config: Any, model_args: Any, settings: MMFuserConfig) -> MMFuserConfig:
    existing = getattr(config, "mm_projector_type", "linear")
    if getattr(model_args, "mm_fuser_projector", None) not in (None, existing):
        raise ValueError(
            f"mm_fuser_projector={model_args.mm_fuser_projector!r}, but the checkpoint's projector is "
            f"{existing!r}; drop the flag"
        )
    return dataclasses.replace(settings, projector=existing)


def _put_fuser_in_front(projector: Any, settings: MMFuserConfig, tower: Any) -> MMFuserProjector:
    _refuse_s2(tower)
    fused = MMFuserProjector.build(settings, tower.hidden_size, projector)
    like = next(projector.parameters())
    fused.fuser.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    return_layers(tower, settings.layers)
    return fused


def _report(projector: MMFuserProjector, settings: MMFuserConfig, source: Any, missing: Sequence[str] = ()) -> None:
    """One line: layers, attention, implementation, where the weights came from (None: nowhere), how many were there."""
    like = next(projector.fuser.parameters(), next(projector.parameters()))
    sampling = select_implementation(like.device, like.dtype)
    total = sum(1 for _ in projector.fuser.parameters())
    if total == 0:
        weights = "it has none"
    elif source is None:
        weights = "fresh, starts as identity"
    elif not missing:
        weights = f"from {source}"
    elif len(missing) == total:
        weights = f"none of {total} tensors is in {source}; starts as identity unless an adapter follows"
    else:
        weights = f"{total - len(missing)} of {total} tensors from {source}, fresh: {', '.join(missing)}"
    logger.log(
        logging.WARNING if missing else logging.INFO,
        "%s%s -> %s; fuser weights: %s",
        settings.summary(),
        f" ({sampling} on {like.device})" if "num_points" not in settings.without_effect else "",
        settings.projector,
        weights,
    )
    if not FUSIONS[settings.fusion] and source is None:
        logger.warning(
            "mm_fuser_fusion=%s does not start as an identity: a released LLaVA answers otherwise until it is trained",
            settings.fusion,
        )


def _log_to_stderr() -> None:
    """One line per event on stderr of rank 0, unless the application configured this logger itself."""
    if not logger.handlers and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        handler.addFilter(lambda record: os.environ.get("RANK", "0") == "0")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _path_of(package: str) -> Optional[str]:
    module = sys.modules.get(package)
    return os.path.dirname(module.__file__) if getattr(module, "__file__", None) else None


def _version_of(distribution: str) -> Optional[str]:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
