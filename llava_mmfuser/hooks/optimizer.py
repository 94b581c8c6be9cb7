"""What training adds for the fuser: its own learning rate, its gates in the logs, refusals before the first step."""

import logging
from typing import Any, Dict, Iterable, Optional, Tuple

import torch
from torch import nn

from ..block.fusion import Fusion
from ..block.leaves import Gate
from ..projector import MMFuserProjector
from .wrappers import config_of, find_projector, gathered, replaced

logger = logging.getLogger("llava_mmfuser")


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
    held = {id(parameter) for parameter in trained}
    if gate is None or id(gate) in held:
        return
    with gathered([gate]):
        identity = fuser.is_identity()
    if identity:
        raise ValueError(UNTRAINED)
    if not any(id(parameter) in held for parameter in fuser.parameters()):
        logger.info("the fuser is not trained in this run; it stays as it was trained before")


UNTRAINED = (
    "the fuser is still an identity and would not be trained in this run: it would stay one in a checkpoint that calls "
    "itself mmfuser. Drop --freeze_mm_mlp_adapter (or whatever else freezes model.mm_projector; LLaVA-NeXT's "
    "--mm_tunable_parts calls it mm_mlp_adapter), start from a trained fuser (--pretrain_mm_mlp_adapter, or a "
    "checkpoint that has one), or write --mm_projector_type mlp2x_gelu"
)


def check_token_budget(model: nn.Module, projector: MMFuserProjector) -> None:
    """Refuse a token concatenation of which LLaVA would cut off the end: its sequences end at ``model_max_length``.

    Raises:
        ValueError: one image has at least as many tokens as a sequence may have.
    """
    limit = getattr(config_of(model), "tokenizer_model_max_length", None)
    if limit is None or projector.fuser.num_tokens(1) == 1:
        return
    tower: Any = next(module for module in model.modules() if hasattr(module, "select_layer"))
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


def has_fuser(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a Trainer trains a model with a fuser."""
    return find_projector(self.model) is not None


def create_optimizer(original, self):
    projector: Any = find_projector(self.model)
    created, optimizer = self.optimizer is None, original(self)
    if created:
        regroup(optimizer, projector.fuser, projector.lr)
    check_trained(projector.fuser, _held(optimizer))
    return optimizer


def create_scheduler(original, self, num_training_steps, optimizer=None):
    """Every optimizer passes here before a scheduler has taken its rates, whoever made it."""
    projector: Any = find_projector(self.model)
    found = self.optimizer if optimizer is None else optimizer
    check_token_budget(self.model, projector)
    if self.lr_scheduler is None and not _has_rate(found, projector):
        regroup(found, projector.fuser, projector.lr)
    _check_groups(found, projector)
    return original(self, num_training_steps, optimizer)


def load_optimizer_and_scheduler(original, self, checkpoint):
    """The last place before the first step, where a Trainer's own way to a scheduler has not passed the other."""
    if not self.is_deepspeed_enabled:  # its optimizer holds flattened copies; `deepspeed_init` has checked
        _check_groups(self.optimizer, find_projector(self.model))
    return original(self, checkpoint)


def _held(optimizer: Any) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _has_rate(optimizer: Any, projector: MMFuserProjector) -> bool:
    """Whether an optimizer trains the fuser at ``mm_fuser_lr``, or at whatever rate where none was given."""
    ours = {id(parameter) for parameter in projector.fuser.parameters()}
    groups = [group for group in optimizer.param_groups if any(id(value) in ours for value in group["params"])]
    return projector.lr is None or {group.get("initial_lr", group["lr"]) for group in groups} == {projector.lr}


def _check_groups(optimizer: Any, projector: Any) -> None:
    """Refuse an optimizer, whoever made it, that leaves the fuser an identity or ignores its rate."""
    check_trained(projector.fuser, _held(optimizer))
    if not _has_rate(optimizer, projector):
        raise ValueError(
            f"mm_fuser_lr={projector.lr}, but the optimizer and the scheduler that the Trainer was given have another "
            f"rate for the fuser; give its parameters a group with this rate, pass the Trainer an optimizer alone, or "
            f"drop the flag"
        )


def deepspeed_init(original, self, *args, **kwargs):
    projector: Any = find_projector(self.model)
    lr, config = projector.lr, self.accelerator.state.deepspeed_plugin.hf_ds_config.config
    sections = [section for section in ("optimizer", "scheduler") if section in config]
    if "optimizer" in sections:  # then no other optimizer is made
        check_trained(projector.fuser, filter(lambda parameter: parameter.requires_grad, self.model.parameters()))
    if lr is not None and sections:
        raise ValueError(
            f"mm_fuser_lr={lr}, but the DeepSpeed configuration has the section {' and '.join(sections)}, which has "
            f"one learning rate for all; delete it there (LLaVA's zero2.json and zero3.json have none), or drop the "
            f"flag"
        )
    return original(self, *args, **kwargs)


def logs_gates(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether this step is logged, with the gates."""
    return self.control.should_log and has_fuser(self) and find_projector(self.model).log_gates  # type: ignore[union-attr]


def maybe_log(original, self, *args, **kwargs):
    """The gates are gathered here, where every rank is; `Trainer.log` may be called by one rank alone."""
    projector: Any = find_projector(self.model)
    gates, log = gate_means(projector.fuser), self.log

    def with_gates(logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(gates)
            warn_if_shut(self, projector.lr, gates)
        return log(logs, *args, **kwargs)

    with replaced(self, "log", with_gates):
        return original(self, *args, **kwargs)


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
