"""Checkpoints in the middle of a run that can be resumed, also in stage 1 and with LoRA."""

import contextlib
import functools
import os
import re
import sys
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import nn

from ..checkpoints.files import read_config, read_tensors, save_tensors
from ..checkpoints.verdict import other_setting
from ..config import PROJECTOR_TYPE, MMFuserConfig, read_setting
from ..names import differences
from . import next as llava_next
from .optimizer import RATES
from .wrappers import config_of, find_projector, gathered, replaced


def _trainables(model: nn.Module) -> Iterator[Tuple[str, nn.Parameter]]:
    """What is trained besides LoRA, as upstream's ``non_lora_trainables.bin``."""
    for name, value in model.named_parameters():
        if value.requires_grad and "lora_" not in name:
            yield re.sub(r"\.modules_to_save\.[^.]+", "", name), value


def save_trainables(model: nn.Module, path: str, write: bool) -> None:
    """Save what is trained besides LoRA; under ZeRO-3 every rank must call it.

    Args:
        model: as the Trainer holds it.
        path: the file, replaced in one step.
        write: whether this rank writes.
    """
    state = {}
    for name, parameter in _trainables(model):
        with gathered([parameter]):
            if write:
                state[name] = parameter.detach().cpu().clone()
    if write:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_tensors(state, path)


def load_trainables(model: nn.Module, path: str) -> None:
    """Load what `save_trainables` saved.

    Raises:
        ValueError: no such file, an unreadable one, or one that does not hold exactly what is trained now.
    """
    state, wanted = read_tensors(path), dict(_trainables(model))
    shapes, expected = ({name: tuple(value.shape) for name, value in kind.items()} for kind in (state, wanted))
    problems = differences(shapes, expected)
    if problems:
        raise ValueError(
            f"{path} does not belong to this run: {problems}; resume with the flags of the interrupted run, "
            f"or choose another output_dir"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


# Checkpoints in the middle of a run. Upstream's cannot be resumed in stage 1 (only the projector is saved, no state of
# the optimizer), and with LoRA they lack all that is trained besides LoRA, here the MLP and the fuser.
ADAPTER, NON_LORA = "mm_projector.bin", "non_lora_trainables.bin"


def _trainables_file(model: nn.Module) -> Optional[str]:
    """The file in a checkpoint for what is trained besides LoRA; None for a full finetune or without a fuser."""
    if find_projector(model) is None:
        return None
    config = config_of(model)
    if llava_next.trains_the_adapter_alone(config) or getattr(config, "tune_mm_mlp_adapter", False):
        return ADAPTER
    peft = sys.modules.get("peft")
    return NON_LORA if peft and isinstance(model, peft.PeftModel) else None


def saves_adapter(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a Trainer is in stage 1, with a fuser."""
    return _trainables_file(self.model) == ADAPTER


def saves_trainables(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a Trainer is in stage 1 or trains LoRA, with a fuser."""
    return _trainables_file(self.model) is not None


def has_fuser_in(engine: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether DeepSpeed's engine holds a model with a fuser."""
    return find_projector(engine.module) is not None


def _check_same_settings(model: nn.Module, checkpoint: str) -> None:
    """Refuse to resume a checkpoint whose fuser has other layers or settings, which its shapes may not show."""
    config = read_config(checkpoint) or {}
    if config.get("mm_projector_type") == PROJECTOR_TYPE:
        running = config_of(model)
        before, now = MMFuserConfig.from_llava(config), MMFuserConfig.from_llava(running)
        rates = [(name, *(read_setting(source, name) for source in (config, running))) for name in RATES]
        others = [rate for rate in rates if rate[1] != rate[2]]  # the optimizer's state would bring the old one back
        changed = other_setting(before, now) or (others[0] if others else None)
        if changed is not None:
            raise ValueError(
                f"{checkpoint} was trained with {changed[0]}={changed[1]}, but this run has {changed[2]}; "
                f"resume with the flags of the interrupted run, or choose another output_dir"
            )


def save_checkpoint(original, self, model, trial, metrics=None):
    from transformers import Trainer

    save = self.model_wrapped.save_checkpoint if self.is_deepspeed_enabled else None
    trained_only = functools.partial(save, exclude_frozen_parameters=True) if save else None
    known = {} if metrics is None else {"metrics": metrics}  # transformers has no such parameter since 4.47
    with replaced(self.model_wrapped, "save_checkpoint", trained_only) if save else contextlib.nullcontext():
        return Trainer._save_checkpoint(self, model, trial, **known)


def save_model(original, self, output_dir=None, _internal_call=False):
    file = _trainables_file(self.model)
    if file != ADAPTER or not _internal_call:
        original(self, output_dir, _internal_call=_internal_call)
    if _internal_call:
        output_dir = output_dir or self.args.output_dir
        save_trainables(self.model, os.path.join(output_dir, str(file)), self.args.should_save)
        if self.args.should_save:
            config_of(self.model).save_pretrained(output_dir)


def load_from_checkpoint(original, self, resume_from_checkpoint, model=None):
    file = _trainables_file(self.model)
    _check_same_settings(self.model, resume_from_checkpoint)
    if file == ADAPTER and not os.path.isfile(os.path.join(resume_from_checkpoint, "trainer_state.json")):
        raise ValueError(
            f"{resume_from_checkpoint} holds an adapter only and cannot be resumed; move it out of output_dir, and to "
            f"start from it, pass --pretrain_mm_mlp_adapter {os.path.join(resume_from_checkpoint, file)}"
        )
    if file != ADAPTER:
        original(self, resume_from_checkpoint, model)
    if file is not None:
        load_trainables(self.model, os.path.join(resume_from_checkpoint, file))


def load_best_model(original, self):
    if self.is_deepspeed_enabled:  # its own checkpoints have all that is trained
        return original(self)
    file = str(_trainables_file(self.model))
    if file != ADAPTER:
        original(self)
    load_trainables(self.model, os.path.join(self.state.best_model_checkpoint, file))


def deepspeed_load_checkpoint(original, deepspeed_engine, checkpoint_path, *args, **kwargs):
    _check_same_settings(deepspeed_engine.module, checkpoint_path)
    if _trainables_file(deepspeed_engine.module) is None:
        return original(deepspeed_engine, checkpoint_path, *args, **kwargs)
    load = deepspeed_engine.load_checkpoint
    lenient = lambda *args, **kwargs: load(*args, **{**kwargs, "load_module_strict": False})  # noqa: E731
    with replaced(deepspeed_engine, "load_checkpoint", lenient):  # frozen weights are not in it
        return original(deepspeed_engine, checkpoint_path, *args, **kwargs)
