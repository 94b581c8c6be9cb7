"""What training adds for the fuser: its own learning rate, its gates in the logs, checkpoints that can be resumed.

Functions whose first argument is `original` are put in the place of what `llava_patch` names; without a fuser in the
model they do nothing but call it.
"""

import contextlib
import logging
import os
import re
import sys
from typing import Any, ContextManager, Dict, Iterable, Iterator, Optional, Tuple

import torch
from torch import nn

from .block.fusion import Fusion
from .block.leaves import Gate
from .checkpoint import differences, read_config, read_tensors, save_tensors
from .config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig, read_setting, spell
from .projector import MMFuserProjector

logger = logging.getLogger("llava_mmfuser")


def is_wrapper(module: Any) -> bool:
    """Whether it is what PEFT's ``modules_to_save`` puts around a module: the frozen original beside trained copies."""
    return isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def unwrapped(module: Any) -> Any:
    """The copy in use where PEFT's ``modules_to_save`` has wrapped a module, else the module itself."""
    if not is_wrapper(module):
        return module
    name = module.active_adapter
    return module.modules_to_save[name] if name in module.modules_to_save else module.original_module


def find_projector(model: nn.Module) -> Optional[MMFuserProjector]:
    """The projector with fuser that a model uses, wrapped by PEFT or not; None where there is none."""
    return next((module for module in map(unwrapped, model.modules()) if isinstance(module, MMFuserProjector)), None)


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: Optional[int] = None) -> ContextManager:
    """Context in which parameters are whole, also under ZeRO-3; every rank must enter it.

    Args:
        parameters: any parameters.
        modifier_rank: rank whose changes all others receive on leaving, None if nothing is changed.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)


def regroup(optimizer: torch.optim.Optimizer, fuser: nn.Module, lr: Optional[float]) -> None:
    """Give the fuser its own learning rate, and its gates, norms and biases no weight decay, before the first step.

    Args:
        optimizer: holds every trainable parameter once; the fuser's move to groups of their own.
        fuser: the block.
        lr: its learning rate; None leaves that of the group which upstream put it in.

    Raises:
        ValueError: a learning rate for a fuser that is not trained.
    """
    ours = {id(parameter) for parameter in fuser.parameters()}
    undecayed = {
        id(parameter)
        for module in fuser.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or not getattr(module, "decays", True)
    }
    added: Dict[Tuple[float, float], Dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in [parameter for parameter in group["params"] if id(parameter) in ours]:
            settings = {name: value for name, value in group.items() if name != "params"}
            settings["lr"] = group["lr"] if lr is None else lr
            settings["weight_decay"] = 0.0 if id(parameter) in undecayed else group["weight_decay"]
            key = settings["lr"], settings["weight_decay"]
            added.setdefault(key, {**settings, "params": []})["params"].append(parameter)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    if lr is not None and not added:
        raise ValueError(
            f"mm_fuser_lr={lr}, but the fuser is not trained (freeze_mm_mlp_adapter?); drop one of the flags"
        )
    # DeepSpeed does not flatten empty groups
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in added.values():
        optimizer.add_param_group(group)


def check_trained(fuser: Fusion, trained: Iterable[nn.Parameter]) -> None:
    """Refuse to train around a fuser that is an identity and would stay one; say so where a trained one is kept.

    Args:
        fuser: the block.
        trained: what the optimizer holds.

    Raises:
        ValueError: the parameter that every change of the output passes through is zero, and the optimizer lacks it.
    """
    gate = fuser.gate()
    trained = {id(parameter) for parameter in trained}
    if gate is None or id(gate) in trained:
        return
    with gathered([gate]):
        identity = fuser.is_identity()
    if identity:
        raise ValueError(UNTRAINED)
    if not any(id(parameter) in trained for parameter in fuser.parameters()):
        logger.info("the fuser is not trained in this run; it stays as it was trained before")


UNTRAINED = (
    "the fuser is still an identity and would not be trained in this run: it would stay one in a checkpoint that calls "
    "itself mmfuser. Drop --freeze_mm_mlp_adapter (or whatever else freezes model.mm_projector), start from a trained "
    "fuser (--pretrain_mm_mlp_adapter, or a checkpoint that has one), or write --mm_projector_type mlp2x_gelu"
)


def check_token_budget(model: nn.Module, projector: MMFuserProjector) -> None:
    """Refuse a token concatenation of which LLaVA would cut off the end: its sequences end at ``model_max_length``.

    Raises:
        ValueError: one image has at least as many tokens as a sequence may have.
    """
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    if limit is None or projector.fuser.num_tokens(1) == 1:
        return
    tower = next(module for module in model.modules() if hasattr(module, "select_layer"))
    tokens = projector.fuser.num_tokens(tower.num_patches)
    if tokens >= limit:
        raise ValueError(
            f"model_max_length={limit}, but mm_fuser_fusion=token_concat makes {tokens} tokens of one image "
            f"({projector.fuser.num_layers} layers of {tower.num_patches}), and LLaVA cuts off the rest with the text; "
            f"name fewer layers by --mm_fuser_layers, or raise --model_max_length as far as the language model allows"
        )


def gate_means(fuser: nn.Module) -> Dict[str, float]:
    """Mean absolute value of each gate, 0 while the fuser is an identity; under ZeRO-3 every rank must call it."""
    gates = {name: module.scale for name, module in fuser.named_modules() if isinstance(module, Gate)}
    with gathered(gates.values()):
        return {f"mm_fuser_{name}": scale.detach().float().abs().mean().item() for name, scale in gates.items()}


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


def create_optimizer(original, self):
    created, optimizer = self.optimizer is None, original(self)
    projector = find_projector(self.model)
    if created and projector is not None:
        check_token_budget(self.model, projector)
        regroup(optimizer, projector.fuser, projector.lr)
    if projector is not None:
        check_trained(projector.fuser, (p for group in optimizer.param_groups for p in group["params"]))
    return optimizer


def deepspeed_init(original, self, *args, **kwargs):
    projector = find_projector(self.model)
    if projector is not None:
        lr, config = projector.lr, self.accelerator.state.deepspeed_plugin.hf_ds_config.config
        sections = [section for section in ("optimizer", "scheduler") if section in config]
        if "optimizer" in sections:  # then `create_optimizer` is not called
            check_trained(projector.fuser, filter(lambda parameter: parameter.requires_grad, self.model.parameters()))
        if lr is not None and sections:
            raise ValueError(
                f"mm_fuser_lr={lr}, but the DeepSpeed configuration has the section {' and '.join(sections)}, which "
                f"has one learning rate for all; delete it there (LLaVA's zero2.json and zero3.json have none), or "
                f"drop the flag"
            )
    return original(self, *args, **kwargs)


def log(original, self, logs, *args, **kwargs):
    projector = find_projector(self.model) if "loss" in logs else None
    if projector is not None and projector.log_gates:
        gates = gate_means(projector.fuser)
        logs.update(gates)
        warn_if_shut(self, projector.lr, gates)
    return original(self, logs, *args, **kwargs)


SHUT, REACH = 0.01, 0.1  # of the cross gate: its mean absolute value, and how far the rest of a run may move it


def warn_if_shut(trainer: Any, lr: Optional[float], gates: Dict[str, float]) -> None:
    """Say once, at the first log after the warm-up, if the cross gate is shut and this run cannot open it.

    AdamW moves a parameter by at most about the learning rate per step, and a schedule that falls to 0 halves the sum.
    """
    args, state = trainer.args, trainer.state
    since = state.global_step - args.get_warmup_steps(state.max_steps)
    if not 0 < since <= state.logging_steps or gates.get("mm_fuser_cross_gate", 1.0) >= SHUT:
        return
    lr = next(value for value in (lr, getattr(args, "mm_projector_lr", None), args.learning_rate) if value is not None)
    left = state.max_steps - state.global_step
    if left and lr * left / 2 < REACH and trainer.is_world_process_zero():
        logger.warning(
            "the fuser's cross gate is at %.2g after the warm-up, and a learning rate of %g moves it by %.2g at most "
            "in the %d steps left, so that the fuser will change little; recommended is at least one over the number "
            "of steps: --mm_fuser_lr %.0e",
            gates["mm_fuser_cross_gate"],
            lr,
            lr * left / 2,
            left,
            1 / state.max_steps,
        )


# Checkpoints in the middle of a run. Upstream's cannot be resumed in stage 1 (only the projector is saved, no state of
# the optimizer), and with LoRA they lack all that is trained besides LoRA, here the MLP and the fuser.
ADAPTER, NON_LORA = "mm_projector.bin", "non_lora_trainables.bin"


def _trainables_file(model: nn.Module) -> Optional[str]:
    """The file in a checkpoint for what is trained besides LoRA; None for a full finetune or without a fuser."""
    if find_projector(model) is None:
        return None
    if getattr(model.config, "tune_mm_mlp_adapter", False):
        return ADAPTER
    peft = sys.modules.get("peft")
    return NON_LORA if peft and isinstance(model, peft.PeftModel) else None


def _check_same_settings(model: nn.Module, checkpoint: str) -> None:
    """Refuse to resume a checkpoint whose fuser has other layers or settings, which its shapes may not show."""
    config = read_config(checkpoint) or {}
    if find_projector(model) is not None and config.get("mm_projector_type") == PROJECTOR_TYPE:
        before, now = MMFuserConfig.from_llava(config), MMFuserConfig.from_llava(model.config)
        name = now.difference(before)
        if name is None:
            name = "lr"  # the optimizer's state would bring the old one back
            was, is_now = (read_setting(source, FLAG_PREFIX + name) for source in (config, model.config))
        else:
            was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now:
            raise ValueError(
                f"{checkpoint} was trained with {FLAG_PREFIX}{name}={spell(was)}, but this run has {spell(is_now)}; "
                f"resume with the flags of the interrupted run, or choose another output_dir"
            )


def save_checkpoint(original, self, model, trial, metrics=None):
    if _trainables_file(self.model) != ADAPTER:
        return original(self, model, trial, metrics=metrics)
    from transformers import Trainer

    engine = self.model_wrapped
    trained_only = _replaced(engine, "save_checkpoint", exclude_frozen_parameters=True)
    with trained_only if self.is_deepspeed_enabled else contextlib.nullcontext():
        return Trainer._save_checkpoint(self, model, trial, metrics=metrics)


def save_model(original, self, output_dir=None, _internal_call=False):
    file = _trainables_file(self.model) if _internal_call else None
    if file != ADAPTER:
        original(self, output_dir, _internal_call=_internal_call)
    if file is not None:
        output_dir = output_dir or self.args.output_dir
        save_trainables(self.model, os.path.join(output_dir, file), self.args.should_save)
        if self.args.should_save:
            self.model.config.save_pretrained(output_dir)


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
    file = _trainables_file(self.model)
    if file != ADAPTER or self.is_deepspeed_enabled:
        original(self)
    if file is not None and not self.is_deepspeed_enabled:  # its own checkpoints have all that is trained
        load_trainables(self.model, os.path.join(self.state.best_model_checkpoint, file))


def deepspeed_load_checkpoint(original, deepspeed_engine, checkpoint_path, *args, **kwargs):
    _check_same_settings(deepspeed_engine.module, checkpoint_path)
    if _trainables_file(deepspeed_engine.module) is None:
        return original(deepspeed_engine, checkpoint_path, *args, **kwargs)
    with _replaced(deepspeed_engine, "load_checkpoint", load_module_strict=False):  # frozen weights are not in it
        return original(deepspeed_engine, checkpoint_path, *args, **kwargs)


@contextlib.contextmanager
def _replaced(instance: Any, method: str, **arguments: Any) -> Iterator[None]:
    """Within this context the method has these arguments set, whatever it is called with."""
    original = getattr(instance, method)
    setattr(instance, method, lambda *args, **kwargs: original(*args, **{**kwargs, **arguments}))
    try:
        yield
    finally:
        delattr(instance, method)
