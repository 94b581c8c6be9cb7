"""Everything this package does to LLaVA, as one table (`PATCHES`), and nothing else names LLaVA's symbols.

Not patched, because upstream selects on the substring ``mm_projector`` or on attributes that stay as they are: train.py
and its saving, LoRA and quantisation code, the evaluation and serving scripts.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any, Dict, Optional, Sequence, Tuple

from . import trainer
from .block.kinds import FUSIONS
from .block.leaves import Resettable, materialize, own_random_state, reset
from .block.sampling import select_implementation
from .checkpoint import (
    convert_hint,
    has_fuser,
    is_authors_config,
    matching_adapter,
    missing_fuser_keys,
    read_adapter,
    read_config,
)
from .config import (
    FLAG_PREFIX,
    PROJECTOR_TYPE,
    MMFuserConfig,
    check_arguments,
    check_tower,
    explicit_settings,
    layers_setting,
    read_setting,
    resolve_layers,
    spell,
    with_fuser_flags,
)
from .inspection import (
    FULL,
    MIXED,
    check_features,
    check_weights,
    folder_kind,
    misfit,
    name_problem,
    projector_shapes,
    projector_weights,
    read_weights,
    tower_config,
)
from .patching import Patch, check_row, folder_of, replace, restore
from .projector import MMFuserProjector
from .towers import return_layers

logger = logging.getLogger("llava_mmfuser")
SEED = "mm_fuser_seed"  # of the run, on `ModelArguments`; no flag


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
    holder = getattr(self, "mm_projector", None)
    projector = trainer.unwrapped(holder)
    wanted = getattr(model_args, "mm_projector_type", "linear") == PROJECTOR_TYPE
    fused = isinstance(projector, MMFuserProjector)
    if not wanted:
        if fused:
            raise ValueError(_other_type(model_args))
        _refuse_layer_list(model_args)
        return original(self, model_args, fsdp=fsdp)

    if fsdp:
        raise ValueError(
            f"fsdp={fsdp} together with mm_projector_type={PROJECTOR_TYPE} is not supported; use DeepSpeed instead"
        )
    _check_trainer(model_args)
    tower = self.get_vision_tower()
    if fused:
        settings, source = _kept_settings(self.config, tower.config, model_args), "the checkpoint"
    else:
        settings, source = _resolve(model_args, tower.vision_tower_name if tower else model_args.vision_tower), None
        if projector is not None:
            settings = _existing_projector_settings(self.config, model_args, settings)
    settings.refuse_useless(explicit_settings(model_args), model_args)
    adapter, model_args = model_args.pretrain_mm_mlp_adapter, copy.copy(model_args)
    model_args.pretrain_mm_mlp_adapter = None
    if projector is not None and not fused:
        projector = _put_fuser_in_front(projector, settings, tower)
        wrapped = trainer.is_wrapper(holder)
        self.mm_projector = type(holder)(projector, holder.active_adapter) if wrapped else projector
    self.config.update(settings.to_llava())
    self.config.mm_fuser_lr = getattr(model_args, "mm_fuser_lr", None)  # as upstream keeps mm_projector_lr
    original(self, model_args, fsdp=fsdp)
    projector = trainer.unwrapped(self.mm_projector)
    if self.mm_projector is not projector:
        self.mm_projector.original_module.requires_grad_(False)  # upstream unfreezes all that is below mm_projector
    projector.lr = self.config.mm_fuser_lr
    projector.log_gates = getattr(model_args, "mm_fuser_log_gates", True)
    query = model_args.mm_vision_select_layer
    vision_config = self.get_vision_tower().config
    if not isinstance(query, int) or query % (vision_config.num_hidden_layers + 1) != settings.layers[-1]:
        self.config.mm_vision_select_layer = settings.layers[-1]
    seed = getattr(model_args, SEED, None)
    weights = None if adapter is None else matching_adapter(adapter, settings, projector.shapes(), vision_config)
    with trainer.gathered(projector.parameters(), modifier_rank=0):
        if seed is not None:
            with own_random_state(seed):
                reset(projector.fuser, projector.missing if fused else dict(projector.fuser.named_parameters()))
        if weights is not None:
            projector.load_state_dict(weights)
            source = adapter if projector.num_loaded or not FUSIONS[settings.fusion].has_weights else source
    _report(projector, settings, source)


def _initialize_weights(original, self, module, *args, **kwargs):
    """Parameters that a checkpoint lacked, and models made without one: the fuser's modules know their own values."""
    if isinstance(module, Resettable) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        module._is_hf_initialized = True
    else:
        original(self, module, *args, **kwargs)


def _load_pretrained_weights(original, *args, **kwargs):
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    _check_weights(given)
    loaded = original(*args, **kwargs)
    for projector in given["model"].modules():
        if isinstance(projector, MMFuserProjector):
            # With low_cpu_mem_usage=True and no device_map, transformers 4.37 takes missing tensors of equal size for
            # tied ones and leaves them on the meta device.
            materialize(projector)
            settings = MMFuserConfig.from_llava(given["model"].config)
            projector.missing = missing_fuser_keys(given["loaded_keys"], projector)
            _report(projector, settings, given["pretrained_model_name_or_path"], projector.missing)
    return loaded


def _check_weights(given: Dict[str, Any]) -> None:
    """Ask of what `_load_pretrained_model` is about to read whether it fits, if the model or the weights have a fuser.
    Other models than LLaVA's may leave a projector out, as they do without a fuser."""
    model, path, files = given["model"], given["pretrained_model_name_or_path"], given["resolved_archive_file"]
    config = vars(model.config)
    if not hasattr(model, "get_vision_tower"):
        return
    if config.get("mm_projector_type") != PROJECTOR_TYPE and not has_fuser(given["loaded_keys"]):
        return
    try:
        if config.get("mm_vision_tower") is None and has_fuser(given["loaded_keys"]):
            raise ValueError("config.json has no mm_vision_tower, but the weights hold a fuser; write it there")
        projector = next((module for module in model.modules() if isinstance(module, MMFuserProjector)), None)
        shapes = None if projector is None else projector.shapes()
        files = [files] if isinstance(files, str) else files or []
        check_weights(config, shapes, given["loaded_keys"], files, given["state_dict"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; `python -m llava_mmfuser inspect` shows what is there") from error


def _parse_arguments(original, self, *args, **kwargs):
    parsed = original(self, *args, **kwargs)
    model_args = next((part for part in parsed if hasattr(part, "mm_projector_type")), None)
    training_args = next((part for part in parsed if hasattr(part, "output_dir")), None)
    if model_args is not None and training_args is not None:
        _check_run(model_args, training_args)
        if model_args.mm_projector_type == PROJECTOR_TYPE:
            setattr(model_args, SEED, training_args.seed)
    return parsed


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
        "weights must fit config.json; says where the fuser's came from",
    ),
    Patch(
        "transformers.hf_argparser:HfArgumentParser.__init__",
        _parser_init,
        ("self", "dataclass_types"),
        "the mm_fuser_* flags, and lists in mm_vision_select_layer",
    ),
    Patch(
        "transformers.hf_argparser:HfArgumentParser.parse_args_into_dataclasses",
        _parse_arguments,
        ("self", "args"),
        "the run's seed for a fresh fuser; the checkpoints that a run starts from and resumes must fit its flags",
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
        "refuses mm_fuser_lr, and a fresh fuser that is frozen, where DeepSpeed has its own optimizer",
    ),
    Patch(
        _TRAINER + ".log",
        trainer.log,
        ("self", "logs"),
        "the gates beside the loss",
    ),
    Patch(
        _TRAINER + "._load_best_model",
        trainer.load_best_model,
        ("self",),
        "load_best_model_at_end restores the projector of stage 1 and of LoRA",
    ),
)
# Module of LLaVA -> what is patched right after its import, and what for.
PATCHES = {
    "llava.model.llava_arch": _MODEL_PATCHES,
    "llava.model.builder": _LOADER_PATCHES,
    "llava.train.llava_trainer": _TRAINER_PATCHES,
}
PURPOSES = dict(zip(PATCHES, ("models", "loading", "training")))
ESSENTIAL = "llava.model.llava_arch"
SWALLOWED = ("llava.model.language_model.llava_llama",)  # imported by LLaVA under `except: pass`

_applied: Dict[str, Optional[str]] = {}  # module -> None, or why its rows were not applied


def apply(module: str) -> None:
    """Check the rows of `PATCHES` for one module, then apply all of them, or none: what has drifted is left alone.

    In that case stderr says why. If it is `llava_arch`, ``mm_projector_type=mmfuser`` raises the same reason and the
    other modules are left alone, too; if it is `llava_trainer`, ``mm_fuser_lr`` raises it. Idempotent.
    """
    if module in _applied or _applied.get(ESSENTIAL):
        return
    _log_to_stderr()
    states = [(row, *check_row(row)) for row in PATCHES[module]]
    problems = [f"{row.target}: {detail}" for row, state, detail in states if state != "ok"]
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
        f"llava_mmfuser does not fit this LLaVA ({folder_of(module)}), whose {module} is left unpatched: "
        f"{'; '.join(problems)}. `python -m llava_mmfuser status` shows every row; "
        f"use LLaVA 1.2.2.post1 or main, or report the change."
    )
    sys.stderr.write(f"{_applied[module]}\n")
    if module == ESSENTIAL:
        _refuse_mmfuser(_applied[module])


def revert(module: Optional[str] = None) -> bool:
    """Put every original back, or those of the rows of one module; returns whether there was anything to undo."""
    undone = [name for name in PATCHES if name in _applied and module in (None, name)]
    restore(None if module is None else [row.target for name in undone for row in PATCHES[name]])
    for name in undone:
        del _applied[name]
    return bool(undone)


def why_unpatched(module: str) -> Optional[str]:
    """Why the rows of an imported module are not in place; None where they are."""
    return _applied.get(ESSENTIAL) or _applied.get(module, "the hook is off; call llava_mmfuser.activate()")


def state_of(row: Patch) -> Tuple[str, str]:
    """State of a row, ``ok``, ``missing`` or ``changed``, and what was found. Imports what it names."""
    state, detail = check_row(row)
    return state, "refuses mmfuser" if detail == "patched" and _applied.get(ESSENTIAL) else detail


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
    check_features(args)
    vision_config = tower_config(vision_tower)
    settings = MMFuserConfig.from_llava(args).resolve(vision_config, layers_setting(args))
    if hasattr(args, "mm_hidden_size"):  # of a checkpoint
        check_tower(args, vision_config)
    return settings


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


def _brings_fuser(arguments: Any) -> bool:
    """Whether `ModelArguments` name weights of a fuser, or it cannot be known yet (a name on the Hub)."""
    adapter, path = arguments.pretrain_mm_mlp_adapter, arguments.model_name_or_path
    if not FUSIONS[MMFuserConfig.from_llava(arguments).fusion].has_weights:
        return True
    if adapter is not None and any(name.startswith(("fuser.", "0.gamma")) for name in read_adapter(adapter)):
        return True
    return not os.path.isdir(path) or (read_config(path) or {}).get("mm_projector_type") == PROJECTOR_TYPE


def _refuse_s2(tower: Any) -> None:
    """Refuse a tower that returns several scales side by side: its features are wider by as much."""
    if hasattr(tower, "forward_feature"):
        raise ValueError(f"s2=True together with mm_projector_type={PROJECTOR_TYPE} is not supported; set s2 to False")


def _refuse_layer_list(args: Any) -> None:
    if is_authors_config(args):
        raise ValueError(
            f"mm_vision_select_layer={spell(args.mm_vision_select_layer)} is a list, which needs "
            f"mm_projector_type={PROJECTOR_TYPE}, but it is {getattr(args, 'mm_projector_type', None)!r}; in a "
            f"config.json this means {convert_hint(getattr(args, '_name_or_path', None) or 'IN')}"
        )


def _check_checkpoint(model_path: str, model_base: Optional[str], model_name: str) -> None:
    """Refuse what `load_pretrained_model` would load silently wrong: the authors' format, adapters that do not fit,
    and a fuser in a folder of which it would not read it, going by the arguments and the name."""
    from transformers.utils import cached_file

    def find(name: str) -> Optional[str]:
        with contextlib.suppress(OSError):  # upstream's own loading says what it misses
            return cached_file(model_path, name)
        return None

    file = find("config.json")
    config = read_config(os.path.dirname(file)) if file else None
    if config is None:
        return
    if is_authors_config(config):
        _refuse_layer_list(SimpleNamespace(**{**config, "_name_or_path": model_path}))
    is_lora, fused = "lora" in model_name.lower(), config.get("mm_projector_type") == PROJECTOR_TYPE
    if fused:
        _check_place(model_path, model_base, model_name, config)
    if model_base is None or "llava" not in model_name.lower():
        return
    adapter = find("non_lora_trainables.bin" if is_lora else "mm_projector.bin")
    if adapter is None:
        return
    if fused:
        settings = MMFuserConfig.from_llava(config)
        matching_adapter(adapter, settings, projector_shapes(config, settings), optional=is_lora)
        return
    weights = {}
    with contextlib.suppress(ValueError):  # what cannot be read with weights_only is left to LLaVA
        weights = projector_weights(read_weights(*os.path.split(adapter)))
    if any(name.startswith("fuser.") for name in weights):
        raise ValueError(f"{adapter}: {misfit(config, weights)}")


def _check_place(path: str, base: Optional[str], name: str, config: Dict[str, Any]) -> None:
    """Of a checkpoint with fuser: that LLaVA will read it as what it is."""
    kind = folder_kind(path) if os.path.isdir(path) else None
    if kind is not None and kind != FULL and base is None:
        raise ValueError(
            f"{path} is {kind}, without model_base its fuser is not read; pass model_base, the model it was trained on"
            + ("" if kind != MIXED else ", or move adapter_config.json away to load the full checkpoint beside it")
        )
    if kind == FULL and base is not None and not os.path.isfile(os.path.join(path, trainer.ADAPTER)):
        raise ValueError(f"{path} is {kind}, but model_base={base!r} was given; pass model_base=None")
    problem = name_problem(name, kind or FULL, config)
    if problem is None:
        return
    if base is not None or "mpt" in name.lower():
        raise ValueError(f"{path}: {problem}, else its fuser is not read")
    logger.warning("%s: %s, else LLaVA loads no vision tower and returns no image_processor", path, problem)


def _check_run(model_args: Any, training_args: Any) -> None:
    """Refuse what train.py would find out after it has read the model, or never: other settings than those of the
    checkpoint that a run starts from, or of the one in output_dir from which it resumes by itself.

    Raises:
        ValueError: with both settings and what to do.
    """
    path = model_args.model_name_or_path
    start = _config_at(path)
    wanted, kept = model_args.mm_projector_type == PROJECTOR_TYPE, start.get("mm_projector_type") == PROJECTOR_TYPE
    if kept:
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
            raise ValueError(_other_type(model_args))
    if model_args.vision_tower is None:
        return
    settings = tower = None
    if wanted:
        tower = tower_config(start.get("mm_vision_tower") or model_args.vision_tower)
        if kept:
            settings = _kept_settings(start, tower, model_args)
        else:
            settings = MMFuserConfig.from_llava(model_args).resolve(tower, layers_setting(model_args))
            if start.get("mm_vision_tower") is not None:
                settings = _existing_projector_settings(start, model_args, settings)
        if getattr(training_args, "freeze_mm_mlp_adapter", False) and not _brings_fuser(model_args):
            raise ValueError(f"freeze_mm_mlp_adapter=True, but {trainer.UNTRAINED}")
    _check_output_dir(model_args, training_args, settings, tower)


def _config_at(path: str) -> Dict[str, Any]:
    """config.json of a folder or of a name on the hub that is in the cache; empty where there is none."""
    from transformers.utils import cached_file

    with contextlib.suppress(OSError):
        return read_config(os.path.dirname(cached_file(path, "config.json", local_files_only=True))) or {}
    return {}


def _check_output_dir(model_args: Any, training_args: Any, settings: Optional[MMFuserConfig], tower: Any) -> None:
    """Refuse a checkpoint in output_dir that this run cannot resume. `settings` is None for a run without fuser."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = training_args.output_dir
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    config = read_config(last) if last else None
    lora = bool(last) and os.path.isfile(os.path.join(last, "adapter_config.json"))
    fused = config is not None and config.get("mm_projector_type") == PROJECTOR_TYPE
    if (config is None and not lora) or (settings is None and not fused):
        return
    config = config or {"mm_projector_type": "one without a fuser"}  # plain LLaVA's checkpoints with LoRA have none
    # A script of one's own may call PEFT without LLaVA's flag.
    was = dict(mm_projector_type=config.get("mm_projector_type"), lora_enable=lora)
    now = dict(mm_projector_type=model_args.mm_projector_type, lora_enable=training_args.lora_enable or lora)
    was["tune_mm_mlp_adapter"] = bool(config.get("tune_mm_mlp_adapter"))
    now["tune_mm_mlp_adapter"] = model_args.tune_mm_mlp_adapter
    if fused and settings is not None:
        before = MMFuserConfig.from_llava(config).resolve(tower)
        name = settings.difference(before)
        if name is not None:
            was[FLAG_PREFIX + name], now[FLAG_PREFIX + name] = getattr(before, name), getattr(settings, name)
    setting = next((name for name in was if was[name] != now[name]), None)
    if setting is not None:
        raise ValueError(
            f"output_dir={folder}: {last}, from which train.py resumes by itself, was trained with "
            f"{setting}={spell(was[setting])}, but this run has {spell(now[setting])}; choose another output_dir, move "
            f"its checkpoint-* away, or resume with the flags of the interrupted run"
        )


def _other_type(model_args: Any) -> str:
    return (
        f"mm_projector_type={model_args.mm_projector_type!r}, but the checkpoint has a fuser "
        f"(mm_projector_type={PROJECTOR_TYPE!r} in its config.json); write --mm_projector_type {PROJECTOR_TYPE}"
    )


def _kept_settings(config: Any, vision_config: Any, model_args: Any) -> MMFuserConfig:
    """The checkpoint's own settings; the script may repeat them, not change them."""
    kept = MMFuserConfig.from_llava(config).resolve(vision_config)
    given = explicit_settings(model_args)
    if "layers" in given:
        given["layers"] = resolve_layers(given["layers"], vision_config.num_hidden_layers, layers_setting(model_args))
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
    existing = read_setting(config, "mm_projector_type") or "linear"
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
    if not FUSIONS[settings.fusion].starts_as_identity and source is None:
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
