"""Everything this package does to LLaVA, as one table (`PATCHES`); only here and in `hooks`, where the bodies are, are
LLaVA's symbols named.

Not patched, because upstream selects on the substring ``mm_projector`` or on attributes that stay as they are: train.py
and its saving, LoRA and quantisation code, the evaluation and serving scripts.
"""

import logging
import os
import sys
from typing import Optional, Tuple

from .config import PROJECTOR_TYPE
from .hooks import arguments, loading, model, optimizer, resuming, run, tower
from .patching import HOOK_OFF, Patch, applied, check_row, folder_of, replace, restore

_CLIP_TOWER = "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower"
_SIGLIP, _NEXT = "llava.model.multimodal_encoder.siglip_encoder", "LLaVA-NeXT"
_PRETRAINED = "transformers.modeling_utils:PreTrainedModel"
_PARSER = "transformers.hf_argparser:HfArgumentParser"
_LLAVA_TRAINER = "llava.train.llava_trainer:LLaVATrainer"
_TRAINER = "transformers.trainer:Trainer"
# What the rows of several places are needed for, until upstream can do it.
_LIST, _REGISTRY = "its tower takes a list of layers", "LLaVA has a registry of projectors"
_PLUGIN_FLAGS, _RATES, _RESUME = "LLaVA takes flags of plugins", "LLaVA has a rate per module", "stage 1 can be resumed"

# Module of LLaVA, after whose import they are applied -> rows: what is replaced, by what (None: only relied upon), the
# parameters it must have, why, until when, and whose it is, if not every LLaVA's.
# fmt: off
PATCHES = {
    "llava.model.llava_arch": (
        Patch(_CLIP_TOWER + ".__init__", tower.init, "self vision_tower args delay_load",
              "checks and resolves the layers before the tower's weights are read", _LIST),
        Patch(_CLIP_TOWER + ".feature_select", None, "self image_forward_outs",
              "not replaced, but a tower with a fuser gives it several layers", _LIST),
        Patch(_CLIP_TOWER + ".forward", None, "self images",
              "not replaced, but a tower with a fuser runs it with its own answer to `self.vision_tower(…)`", _LIST),
        Patch(_SIGLIP + ":SigLipVisionTower.__init__", tower.init_siglip,
              "self vision_tower vision_tower_cfg delay_load",
              "the same for LLaVA-NeXT's SigLIP", _LIST, _NEXT),
        Patch(_SIGLIP + ":SigLipVisionTower.forward", None, "self images",
              "not replaced, but run as that of CLIP", _LIST, _NEXT),
        Patch(_SIGLIP + ":SigLipEncoderLayer.forward", None, "self hidden_states attention_mask",
              "not replaced, but its blocks are called one by one", _LIST, _NEXT),
        Patch("llava.model.multimodal_projector.builder:build_vision_projector", model.build_vision_projector,
              "config delay_load kwargs",
              "knows mm_projector_type=mmfuser", _REGISTRY),
        Patch("llava.model.llava_arch:build_vision_projector", model.build_vision_projector, "config delay_load kwargs",
              "the same function under the name llava_arch imported", _REGISTRY),
        Patch("llava.model.llava_arch:LlavaMetaModel.initialize_vision_modules", model.initialize_vision_modules,
              "self model_args fsdp",
              "an existing projector gets the fuser in front; config.json tells the truth", _REGISTRY),
        Patch(_PRETRAINED + "._initialize_weights", loading.initialize_weights, "self module",
              "fuser weights missing from a checkpoint start as identity",
              "transformers leaves it to a module how it starts"),
        Patch(_PRETRAINED + "._load_pretrained_model", loading.load_pretrained_weights,
              "model state_dict loaded_keys resolved_archive_file pretrained_model_name_or_path"  # transformers < 4.50
              "| model state_dict checkpoint_files pretrained_model_name_or_path"  # < 5
              "| model state_dict checkpoint_files load_config",
              "weights must fit config.json; says where the fuser's came from",
              "LLaVA refuses weights that do not fit"),
        Patch(_PARSER + ".__init__", arguments.parser_init, "self dataclass_types",
              "the mm_fuser_* flags, and lists in mm_vision_select_layer", _PLUGIN_FLAGS),
        Patch(_PARSER + ".parse_args_into_dataclasses", run.parse_args_into_dataclasses, "self args",
              "the run's seed for a fresh fuser; the checkpoints that a run starts from and resumes must fit its flags",
              _PLUGIN_FLAGS),
        Patch("transformers.models.clip.modeling_clip:CLIPEncoderLayer.forward", None,
              "self hidden_states attention_mask causal_attention_mask"
              "| self hidden_states attention_mask kwargs",  # transformers >= 5
              "not replaced, but its blocks are called one by one", "transformers can stop a ViT at a block"),
    ),
    "llava.model.builder": (
        Patch("llava.model.builder:load_pretrained_model", loading.load_pretrained_model,
              "model_path model_base model_name",
              "adapters and checkpoints are checked before the language model is read",
              "LLaVA refuses weights that do not fit"),
    ),
    "llava.train.llava_trainer": (
        Patch(_LLAVA_TRAINER + ".create_optimizer", optimizer.create_optimizer, "self",
              "mm_fuser_lr; gates, norms and biases of the fuser without weight decay", _RATES),
        Patch(_TRAINER + ".create_scheduler", optimizer.create_scheduler, "self num_training_steps",
              "the rate of a fuser's gates or columns that can open it in the run's steps", _RATES),
        Patch(_LLAVA_TRAINER + "._save_checkpoint", resuming.save_checkpoint, "self model trial metrics",
              "stage 1 saves what resuming needs", _RESUME),
        Patch(_TRAINER + ".save_model", resuming.save_model, "self output_dir _internal_call",
              "checkpoints of stage 1 and of LoRA hold the projector", _RESUME),
        Patch(_TRAINER + "._load_from_checkpoint", resuming.load_from_checkpoint, "self resume_from_checkpoint model",
              "resuming stage 1 or LoRA restores the projector", _RESUME),
        Patch("transformers.trainer:deepspeed_load_checkpoint", resuming.deepspeed_load_checkpoint,
              "deepspeed_engine checkpoint_path",
              "resuming stage 1 or LoRA under DeepSpeed, whose checkpoints leave out frozen weights", _RESUME),
        Patch("transformers.trainer:deepspeed_init", optimizer.deepspeed_init, "trainer num_training_steps",
              "refuses mm_fuser_lr, and a fresh fuser that is frozen, where DeepSpeed has its own optimizer", _RATES),
        Patch(_TRAINER + ".log", optimizer.log, "self logs",
              "the gates beside the loss", "the Trainer asks a model what to log"),
        Patch(_TRAINER + "._load_best_model", resuming.load_best_model, "self",
              "load_best_model_at_end restores the projector of stage 1 and of LoRA", _RESUME),
    ),
}
# fmt: on
PURPOSES = dict(zip(PATCHES, ("models", "loading", "training")))
ESSENTIAL = "llava.model.llava_arch"
FITS = "LLaVA 1.1.3 to 1.2.2.post1 and main, or LLaVA-NeXT, with transformers 4.31 to 5.24"
SWALLOWED = ("llava.model.language_model.llava_llama",)  # imported by LLaVA under `except: pass`


logger = logging.getLogger("llava_mmfuser")


def apply(module: str) -> None:
    """Check the rows of `PATCHES` for one module, then apply all of them, or none: what has drifted is left alone.

    In that case stderr says why. If it is `llava_arch`, ``mm_projector_type=mmfuser`` raises the same reason and the
    other modules are left alone, too; if it is `llava_trainer`, ``mm_fuser_lr`` raises it. Idempotent.
    """
    if module in applied or applied.get(ESSENTIAL):
        return
    _log_to_stderr()
    states = [(row, *check_row(row)) for row in PATCHES[module]]
    problems = [f"{row.target}: {detail}" for row, state, detail in states if state not in ("ok", "absent")]
    rows = [(row.target, row.replacement) for row, state, _ in states if state == "ok" and row.replacement is not None]
    if not problems:
        try:
            for target, replacement in rows:
                replace(target, replacement)
        except Exception as error:
            restore(target for target, _ in rows)
            problems = [f"{type(error).__name__}: {error}"]
    if not problems:
        applied[module] = None
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
    return applied.get(ESSENTIAL) or applied.get(module, HOOK_OFF)


def state_of(row: Patch) -> Tuple[str, str]:
    """See `check_row`."""
    state, detail = check_row(row)
    return state, "refuses mmfuser" if detail == "patched" and applied.get(ESSENTIAL) else detail


def _refuse_mmfuser(reason: str) -> None:
    """Make everything of LLaVA that still exists and reads ``mm_projector_type`` raise the reason for ``mmfuser``."""

    def refuse(original, *args, **kwargs):
        if any(getattr(value, "mm_projector_type", None) == PROJECTOR_TYPE for value in (*args, *kwargs.values())):
            raise RuntimeError(reason)
        return original(*args, **kwargs)

    for row in PATCHES[ESSENTIAL]:
        readers = (tower.init, tower.init_siglip, model.build_vision_projector, model.initialize_vision_modules)
        if row.replacement in readers and check_row(row)[0] not in ("missing", "absent"):
            replace(row.target, refuse)


def _log_to_stderr() -> None:
    """One line per event on stderr of rank 0, unless the application configured this logger itself."""
    if not logger.handlers and logger.level == logging.NOTSET:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        handler.addFilter(lambda record: os.environ.get("RANK", "0") == "0")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
