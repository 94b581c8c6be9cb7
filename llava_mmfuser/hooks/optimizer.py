"""What training adds for the fuser: its own learning rate, its gates in the logs, refusals before the first step."""

import logging
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

import torch
from torch import nn

from ..block.fusion import Fusion
from ..block.leaves import Gate
from ..block.mmfuser import MMFuser
from ..projector import MMFuserProjector
from .wrappers import config_of, find_projector, gathered, replaced

logger = logging.getLogger("llava_mmfuser")


RATES = ("mm_fuser_lr", "mm_fuser_gate_lr")
INHERIT = "inherit"  # as mm_fuser_gate_lr: one rate for all of the fuser, as published
Rate = Union[None, float, str]


def opening(fuser: nn.Module) -> List[nn.Parameter]:
    """What opens a fusion that starts as an identity: its `gate`, and the gates within it."""
    gate = fuser.gate() if isinstance(fuser, Fusion) else None
    if gate is None:
        return []
    within = [module.scale for module in fuser.modules() if isinstance(module, Gate) and module.scale is not gate]
    return [gate, *within]


def regroup(optimizer: torch.optim.Optimizer, fuser: nn.Module, lr: Optional[float], gate_lr: Rate = INHERIT) -> None:
    """Give the fuser its own learning rates, and its gates, norms and biases no weight decay, before the first step.

    Args:
        optimizer: holds every trainable parameter once; the fuser's move to groups of their own.
        fuser: the block.
        lr: its learning rate; None leaves that of the group which upstream put it in.
        gate_lr: that of what opens it; ``inherit`` leaves it with the rest. None gives it groups of its own with the
            rest's rate, until `set_opening_rate` knows the steps.

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
    opens = set() if gate_lr == INHERIT else {id(parameter) for parameter in opening(fuser)}
    added: Dict[Tuple[float, float, bool], Dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in [parameter for parameter in group["params"] if id(parameter) in ours]:
            settings = {name: value for name, value in group.items() if name != "params"}
            settings["lr"] = group["lr"] if lr is None else lr
            settings["weight_decay"] = 0.0 if id(parameter) in undecayed else group["weight_decay"]
            if id(parameter) in opens and gate_lr is not None:
                settings["lr"] = gate_lr
            key = settings["lr"], settings["weight_decay"], id(parameter) in opens
            added.setdefault(key, {**settings, "params": []})["params"].append(parameter)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    for name, rate in (("mm_fuser_lr", lr), ("mm_fuser_gate_lr", gate_lr)):
        if isinstance(rate, float) and not added:
            raise ValueError(
                f"{name}={rate}, but the fuser is not trained (freeze_mm_mlp_adapter?); drop one of the flags"
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
    """Mean absolute value of mmfuser's gates or columns, 0 at first unless it starts open; under ZeRO-3 every rank must
    call it."""
    opens = opening(fuser) if isinstance(fuser, MMFuser) else []
    gates = {name.split(".")[0]: p for name, p in fuser.named_parameters() if any(p is other for other in opens)}
    with gathered(gates.values()):
        return {f"mm_fuser_{name}": scale.detach().float().abs().mean().item() for name, scale in gates.items()}


def has_fuser(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a Trainer trains a model with a fuser."""
    return find_projector(self.model) is not None


def create_optimizer(original, self):
    projector: Any = find_projector(self.model)
    created, optimizer = self.optimizer is None, original(self)
    if created:
        regroup(optimizer, projector.fuser, projector.lr, gate_rate(projector))
    check_trained(projector.fuser, _held(optimizer))
    return optimizer


def create_scheduler(original, self, num_training_steps, optimizer=None):
    """Every optimizer passes here before a scheduler takes its rates, whoever made it."""
    projector: Any = find_projector(self.model)
    found, created = self.optimizer if optimizer is None else optimizer, self.lr_scheduler is None
    check_token_budget(self.model, projector)
    if created and not _has_rates(found, projector):
        regroup(found, projector.fuser, projector.lr, gate_rate(projector))
    _check_groups(found, projector)
    scheduler = original(self, num_training_steps, optimizer)
    if created and hasattr(scheduler, "base_lrs"):
        set_opening_rate(scheduler, projector, num_training_steps)
    return scheduler


def load_optimizer_and_scheduler(original, self, checkpoint):
    """The last place before the first step, where a Trainer's own way to a scheduler has not passed the other."""
    if not self.is_deepspeed_enabled:  # its optimizer holds flattened copies; `deepspeed_init` has checked
        _check_groups(self.optimizer, find_projector(self.model))
    return original(self, checkpoint)


def _held(optimizer: Any) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _has_rates(optimizer: Any, projector: MMFuserProjector) -> bool:
    """Whether an optimizer trains the fuser at the rates that were given by flags."""
    gate = gate_rate(projector)
    wanted = {id(parameter): projector.lr for parameter in projector.fuser.parameters()}
    if isinstance(gate, float):
        wanted.update({id(parameter): gate for parameter in opening(projector.fuser)})
    found = [
        (wanted[id(parameter)], group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in wanted
    ]
    given = any(isinstance(rate, float) for rate in wanted.values())
    return not given or (bool(found) and all(rate is None or rate == own for rate, own in found))


def _given(projector: MMFuserProjector) -> str:
    rates = zip(RATES, (projector.lr, projector.gate_lr))
    return " and ".join(f"{name}={rate}" for name, rate in rates if isinstance(rate, float))


def _check_groups(optimizer: Any, projector: Any) -> None:
    """Refuse an optimizer, whoever made it, that leaves the fuser an identity or ignores its rates."""
    check_trained(projector.fuser, _held(optimizer))
    if not _has_rates(optimizer, projector):
        raise ValueError(
            f"{_given(projector)}, but the optimizer and the scheduler that the Trainer was given have another rate "
            f"for the fuser; give its parameters a group with this rate, pass the Trainer an optimizer alone, or drop "
            f"the flag"
        )


def deepspeed_init(original, self, *args, **kwargs):
    projector: Any = find_projector(self.model)
    config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
    sections = [section for section in ("optimizer", "scheduler") if section in config]
    if "optimizer" in sections:  # then no other optimizer is made
        check_trained(projector.fuser, filter(lambda parameter: parameter.requires_grad, self.model.parameters()))
    if sections and _given(projector):
        raise ValueError(
            f"{_given(projector)}, but the DeepSpeed configuration has the section {' and '.join(sections)}, which has "
            f"one learning rate for all; delete it there (LLaVA's zero2.json and zero3.json have none), or drop the "
            f"flag"
        )
    return original(self, *args, **kwargs)


def logs_gates(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether this step is logged, with the gates."""
    projector = find_projector(self.model) if self.control.should_log else None
    return projector is not None and projector.log_gates


def maybe_log(original, self, *args, **kwargs):
    """The gates are gathered here, where every rank is; `Trainer.log` may be called by one rank alone."""
    projector: Any = find_projector(self.model)
    gates, log = gate_means(projector.fuser), self.log

    def with_gates(logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(gates)
        return log(logs, *args, **kwargs)

    with replaced(self, "log", with_gates):
        return original(self, *args, **kwargs)


REACH = 3.0  # how far a run without a flag can move what opens a fuser, unless it took a rate above `MOST`
MOST = 0.02
LEAST = 0.1  # a run that can move it no further is warned
SHUT = 0.01  # below this mean absolute value gates count as shut


def parse_rate(name: str, value: Any) -> Rate:
    """A learning rate from a command line, from YAML, which reads 1e-4 as a text, or by hand.

    Args:
        name: one of `RATES`; ``inherit`` is for the gates only.
        value: a number, a text of one, ``inherit`` or None.

    Raises:
        ValueError: anything else, or a number below 0.
    """
    words = (None, INHERIT) if name == "mm_fuser_gate_lr" else (None,)
    if value in words:
        return value
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = -1.0
    if not 0 <= rate < float("inf"):
        or_inherit = f", or {INHERIT}" if INHERIT in words else ""
        raise ValueError(f"{name}={value} is not allowed; use a number of at least 0, such as 1e-4{or_inherit}")
    return rate


def gate_rate(projector: MMFuserProjector) -> Rate:
    """What `regroup` is told: the flag, or without it ``inherit`` where the fuser's own rate was chosen."""
    return INHERIT if projector.gate_lr is None and projector.lr is not None else projector.gate_lr


def full_steps(scheduler: Any, steps: int) -> float:
    """A run's steps, each counted by the part of its rate that the schedule leaves: cosine makes half of them.

    AdamW moves a parameter by at most about its rate in a step, so this times the rate bounds the way of a whole run.
    """
    factors = getattr(scheduler, "lr_lambdas", None)
    return float(sum(map(factors[0], range(steps)))) if factors else float(steps)


def opening_rate(rate: float, full: float) -> float:
    """The rate for what opens a fuser: `rate`, that of the rest, or one that can move it by `REACH`, at most `MOST`.

    Args:
        rate: of the rest of the fuser.
        full: see `full_steps`.
    """
    return max(rate, min(REACH / max(full, 1.0), MOST))


def set_opening_rate(scheduler: Any, projector: MMFuserProjector, steps: int) -> None:
    """Before the first step: the rate of what opens a fuser that is an identity, or a word about one that stays shut.

    Args:
        scheduler: just made, for an optimizer that `regroup` has seen.
        projector: with the fuser.
        steps: of the whole run.
    """
    fuser, opens = projector.fuser, opening(projector.fuser)
    groups = scheduler.optimizer.param_groups
    ids = {id(parameter) for parameter in opens}
    held = [index for index, group in enumerate(groups) if ids & {id(parameter) for parameter in group["params"]}]
    if not held:
        return
    with gathered(opens[:1]):
        identity, size = fuser.is_identity(), opens[0].detach().float().abs().mean().item()
    full, rest = full_steps(scheduler, steps), scheduler.base_lrs[held[0]]
    apart = all(id(parameter) in ids for index in held for parameter in groups[index]["params"])
    raised = identity and apart and rest > 0 and gate_rate(projector) is None
    rate = opening_rate(rest, full) if raised else rest
    for index in held if rate > rest else []:
        now = groups[index]["lr"] / rest  # of the schedule
        scheduler.base_lrs[index] = groups[index]["initial_lr"] = rate
        groups[index]["lr"] = rate * now
    if rate > rest:
        logger.info(
            "what opens the fuser learns at %.1e, the rest of it at %.1e; --mm_fuser_gate_lr %s gives both the same",
            rate,
            rest,
            INHERIT,
        )
    elif (identity or (isinstance(fuser, MMFuser) and size < SHUT)) and rate * full < LEAST:
        logger.warning(
            "the fuser is shut, and a rate of %.1e moves what opens it by %.2g at most in the %d steps of this run, so "
            "that it will change little; recommended is --mm_fuser_gate_lr %.0e",
            rate,
            rate * full,
            steps,
            opening_rate(0.0, full),
        )
