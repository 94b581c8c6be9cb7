"""Everything this package does to LLaVA and to transformers, as one table (`PATCHES`); only here and in `hooks`, where
the bodies are, are LLaVA's symbols named.

Not patched, because upstream selects on the substring ``mm_projector`` or on attributes that stay as they are: train.py
and its saving, LoRA and quantisation code, the evaluation and serving scripts.
"""

import logging
import os
import sys
from typing import Optional, Tuple

from .config import asks_for_fuser
from .hooks import arguments, loading, model, native, optimizer, resuming, run, tower
from .patching import EXPORTED, HOOK_OFF, Patch, applied, check_row, folder_of, replace, restore

ESSENTIAL, NATIVE = "llava.model.llava_arch", "transformers.models.llava.modeling_llava"
_CLIP_TOWER = "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower"
_SIGLIP_TOWER, _NEXT = "llava.model.multimodal_encoder.siglip_encoder:SigLipVisionTower", "LLaVA-NeXT"
_BUILDER = "llava.model.multimodal_projector.builder"
_PRETRAINED = "transformers.modeling_utils:PreTrainedModel"
_PARSER = "transformers.hf_argparser:HfArgumentParser"
_LLAVA_TRAINER = "llava.train.llava_trainer:LLaVATrainer"
_TRAINER = "transformers.trainer:Trainer"
# What the rows of several places are needed for, until upstream can do it.
_LIST, _REGISTRY = "its tower takes a list of layers", "LLaVA has a registry of projectors"
_PLUGIN_FLAGS, _RATES, _RESUME = "LLaVA takes flags of plugins", "LLaVA has a rate per module", "stage 1 can be resumed"
_FITTING, _NATIVE_REGISTRY = "LLaVA refuses weights that do not fit", "transformers has a registry of projectors"
_STARTS = "transformers leaves it to a module how it starts"

# Module of a host, after whose import they are applied -> rows: what is replaced, by what (None: only relied upon), the
# parameters it must have, why, until when, for which calls, and whose it is, if not every LLaVA's.
# fmt: off
PATCHES = {
    ESSENTIAL: (
        Patch(_CLIP_TOWER + ".__init__", tower.init, "self vision_tower args delay_load",
              "checks and resolves the layers before the tower's weights are read", _LIST, asks_for_fuser),
        Patch(_CLIP_TOWER + ".feature_select", None, "self image_forward_outs",
              "not replaced; a tower with a fuser runs it for every layer", _LIST),
        Patch(_CLIP_TOWER + ".forward", None, "self images",
              "not replaced; a tower with a fuser runs it for every layer, and its ViT once", _LIST),
        Patch(_SIGLIP_TOWER + ".__init__", tower.init, "self vision_tower vision_tower_cfg delay_load",
              "the same for LLaVA-NeXT's SigLIP", _LIST, asks_for_fuser, _NEXT),
        Patch(_SIGLIP_TOWER + ".forward", None, "self images",
              "not replaced, but run as that of CLIP", _LIST, None, _NEXT),
        Patch(_BUILDER + ":build_vision_projector", model.build_vision_projector, "config delay_load kwargs",
              "knows mm_projector_type=mmfuser", _REGISTRY, asks_for_fuser),
        Patch(ESSENTIAL + ":build_vision_projector", model.build_vision_projector, "config delay_load kwargs",
              "the same function under the name llava_arch imported", _REGISTRY, asks_for_fuser),
        Patch(ESSENTIAL + ":LlavaMetaModel.initialize_vision_modules", model.initialize_vision_modules,
              "self model_args",
              "an existing projector gets the fuser in front; config.json tells the truth", _REGISTRY,
              model.concerns_fuser),
        Patch(_PRETRAINED + "._initialize_weights", loading.initialize_weights, "self module",
              "fuser weights missing from a checkpoint start as identity", _STARTS),
        Patch(_PRETRAINED + "._load_pretrained_model", loading.load_pretrained_weights,
              "model state_dict loaded_keys resolved_archive_file pretrained_model_name_or_path"  # transformers < 4.50
              "| model state_dict checkpoint_files pretrained_model_name_or_path"  # < 5
              "| model state_dict checkpoint_files load_config",
              "weights must fit config.json; says where the fuser's came from", _FITTING),
        Patch(_PARSER + ".__init__", arguments.parser_init, "self dataclass_types",
              "the mm_fuser_* flags beside LLaVA's own, and lists in mm_vision_select_layer", _PLUGIN_FLAGS,
              arguments.of_llava),
        Patch(_PARSER + ".parse_args_into_dataclasses", arguments.parse_args_into_dataclasses, "self args",
              "takes those flags out again; what a run starts from and resumes must fit them", _PLUGIN_FLAGS,
              arguments.has_flags),
        Patch(_PARSER + ".parse_dict", arguments.parse_dict, "self args",
              "the same for arguments in JSON, YAML or a dict", _PLUGIN_FLAGS, arguments.has_flags),
    ),
    "llava.model.builder": (
        Patch("llava.model.builder:load_pretrained_model", loading.load_pretrained_model,
              "model_path model_base model_name",
              "adapters and checkpoints are checked before the language model is read", _FITTING),
    ),
    "llava.train.llava_trainer": (
        Patch("transformers.training_args:TrainingArguments.__post_init__", run.training_arguments_init, "self",
              "a fresh fuser takes the run's seed", _PLUGIN_FLAGS),
        Patch(_LLAVA_TRAINER + ".create_optimizer", optimizer.create_optimizer, "self",
              "mm_fuser_lr; gates, norms and biases of the fuser without weight decay", _RATES, optimizer.has_fuser),
        Patch(_TRAINER + ".create_scheduler", optimizer.create_scheduler, "self num_training_steps optimizer",
              "rates that can open the fuser, whoever made the optimizer; refuses a fresh one that is frozen", _RATES,
              optimizer.has_fuser),
        Patch(_TRAINER + "._load_optimizer_and_scheduler", optimizer.load_optimizer_and_scheduler, "self checkpoint",
              "the same where a Trainer makes its scheduler another way", _RATES, optimizer.has_fuser),
        Patch("transformers.trainer:deepspeed_init", optimizer.deepspeed_init, "trainer num_training_steps",
              "the same where DeepSpeed has its own optimizer", _RATES, optimizer.has_fuser),
        Patch(_TRAINER + "._maybe_log_save_evaluate", optimizer.maybe_log, "self tr_loss",
              "the gates beside the loss", "the Trainer asks a model what to log", optimizer.logs_gates),
        Patch(_LLAVA_TRAINER + "._save_checkpoint", resuming.save_checkpoint, "self model trial metrics",
              "stage 1 saves what resuming needs", _RESUME, resuming.saves_adapter),
        Patch(_TRAINER + ".save_model", resuming.save_model, "self output_dir _internal_call",
              "checkpoints of stage 1 and of LoRA hold the projector", _RESUME, resuming.saves_trainables),
        Patch(_TRAINER + "._load_from_checkpoint", resuming.load_from_checkpoint, "self resume_from_checkpoint model",
              "resuming stage 1 or LoRA restores the projector", _RESUME, optimizer.has_fuser),
        Patch("transformers.trainer:deepspeed_load_checkpoint", resuming.deepspeed_load_checkpoint,
              "deepspeed_engine checkpoint_path",
              "resuming stage 1 or LoRA under DeepSpeed, whose checkpoints leave out frozen weights", _RESUME,
              resuming.has_fuser_in),
        Patch(_TRAINER + "._load_best_model", resuming.load_best_model, "self",
              "load_best_model_at_end restores the projector of stage 1 and of LoRA", _RESUME,
              resuming.saves_trainables),
    ),
    NATIVE: (
        Patch(NATIVE + ":LlavaMultiModalProjector.__init__", native.projector_init, "self config",
              "a config.json with mm_fuser_fusion gets its fuser in front of the projector", _NATIVE_REGISTRY,
              native.has_fuser),
        Patch(NATIVE + ":LlavaPreTrainedModel._init_weights", native.init_weights, "self module",
              "fuser weights missing from a folder start as identity", _STARTS),
        Patch(NATIVE + ":LlavaModel.get_image_features", None, "self pixel_values vision_feature_layer",
              "not replaced, but it gives the projector several layers side by side", _NATIVE_REGISTRY),
    ),
}
# fmt: on
PURPOSES = dict(zip(PATCHES, ("models", "loading", "training", EXPORTED)))
FITS = "LLaVA 1.1.3 to 1.2.2.post1 and main, or LLaVA-NeXT, with transformers 4.31 to 5.24"
SWALLOWED = ("llava.model.language_model.llava_llama",)  # imported by LLaVA under `except: pass`


logger = logging.getLogger("llava_mmfuser")


def apply(module: str) -> None:
    """Check the rows of `PATCHES` for one module, then apply all of them, or none: what has drifted is left alone.

    Idempotent. Rows that one host alone has (`Patch.host`) are left out where they do not fit.

    Where nothing is applied, stderr says why. If it is `llava_arch`, ``mm_projector_type=mmfuser`` raises that reason,
    and LLaVA's other modules are left alone, too. If it is `llava_trainer`, ``mm_fuser_lr`` raises it. If it is
    transformers' own LLaVA, only `status` says it: a folder with a fuser then ends in an error about weights of another
    size.
    """
    if module in applied or (module != NATIVE and applied.get(ESSENTIAL)):
        return
    _log_to_stderr()
    states = [(row, *check_row(row)) for row in PATCHES[module]]
    others = {row.host for row, state, _ in states if row.host is not None and state != "ok"}
    states = [state for state in states if state[0].host not in others]
    problems = [f"{row.target}: {detail}" for row, state, detail in states if state != "ok"]
    rows = [(row.target, row.replacement, row.when) for row, _, _ in states if row.replacement is not None]
    if not problems:
        try:
            for target, replacement, when in rows:
                replace(target, replacement, when)
        except Exception as error:
            restore(target for target, _, _ in rows)
            problems = [f"{type(error).__name__}: {error}"]
    if not problems or module == NATIVE:
        applied[module] = "; ".join(problems) or None
        return
    applied[module] = reason = (
        f"llava_mmfuser does not fit this LLaVA ({folder_of(module)}), whose {module} is left unpatched: "
        f"{'; '.join(problems)}. `python -m llava_mmfuser status` shows every row; "
        f"what fits: {FITS}. Use that, or report the change."
    )
    sys.stderr.write(f"{reason}\n")
    if module == ESSENTIAL:
        _refuse_mmfuser(reason)


def revert(module: Optional[str] = None) -> bool:
    """Put every original back, or those of the rows of one module; returns whether there was anything to undo."""
    undone = [name for name in PATCHES if name in applied and module in (None, name)]
    restore([row.target for name in undone for row in PATCHES[name]])
    for name in undone:
        del applied[name]
    return bool(undone)


def why_unpatched(module: str) -> Optional[str]:
    """Why the rows of an imported module are not in place; None where they are."""
    return (applied.get(ESSENTIAL) if module != NATIVE else None) or applied.get(module, HOOK_OFF)


def state_of(module: str, row: Patch) -> Tuple[str, str]:
    """See `check_row`; of a host's rows, how they stand where another host is installed."""
    state, detail = check_row(row)
    if row.host is not None and state != "ok":
        return "absent", f"{row.host} has it" if state in ("absent", "missing") else detail
    return state, "refuses mmfuser" if detail == "patched" and module != NATIVE and applied.get(ESSENTIAL) else detail


def _refuse_mmfuser(reason: str) -> None:
    """Make everything of LLaVA that still exists and reads ``mm_projector_type`` raise the reason for ``mmfuser``."""

    def refuse(original, *args, **kwargs):
        raise RuntimeError(reason)

    for row in PATCHES[ESSENTIAL]:
        if row.when in (asks_for_fuser, model.concerns_fuser) and check_row(row)[0] not in ("missing", "absent"):
            replace(row.target, refuse, asks_for_fuser)


def _log_to_stderr() -> None:
    """One line per event on stderr of rank 0, unless the application configured this logger itself."""
    if not logger.handlers and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        handler.addFilter(lambda record: os.environ.get("RANK", "0") == "0")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
