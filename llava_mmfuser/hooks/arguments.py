"""The command line of train.py: our flags, and all that can be known to be wrong before a weight is read."""

import dataclasses
import functools
from dataclasses import field
from typing import Any, List, Optional, Tuple

from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig, explicit_settings
from ..layers import SPELLINGS, Layers, spell
from .run import check_start, refuse_together

# name, type, default, help of flags that concern training only; upstream keeps mm_projector_lr in config.json, too
TRAINING_FLAGS: Tuple[Tuple[str, Any, Any, str], ...] = (
    (
        "mm_fuser_lr",
        Optional[float],
        None,
        "Learning rate of the fuser (paper, 13B pretraining: 1e-4). If not given: that of the projector.",
    ),
    ("mm_fuser_log_gates", bool, True, "Log the mean absolute value of the fuser's gates with the loss."),
)


def with_fuser_flags(arguments: type) -> type:
    """Extend LLaVA's `ModelArguments` with the ``mm_fuser_*`` flags and a select layer that may be a list.

    Args:
        arguments: a dataclass type with ``mm_projector_type`` and ``mm_vision_select_layer``.

    Returns:
        A subclass under the same name. Its ``mm_vision_select_layer`` is an int, as upstream's, or a tuple of ints;
        every setting of `MMFuserConfig` is None unless given. The `TRAINING_FLAGS` are there, too.
    """
    select_layer = {f.name: f for f in dataclasses.fields(arguments)}["mm_vision_select_layer"]
    extra: List[Tuple[str, Any, Any]] = [
        (
            "mm_vision_select_layer",
            Optional[str],
            field(
                default=select_layer.default,
                metadata={
                    "help": f"hidden_states index of the vision tower; under mm_projector_type=mmfuser also a list: "
                    f"{SPELLINGS}"
                },
            ),
        ),
    ]
    for name, kind, default, text in TRAINING_FLAGS:
        extra.append((name, kind, field(default=default, metadata={"help": text})))
    for setting in dataclasses.fields(MMFuserConfig):
        kind = str if setting.name == "layers" else setting.type
        extra.append((FLAG_PREFIX + setting.name, Optional[kind], field(default=None, metadata=dict(setting.metadata))))

    def __post_init__(self):
        if hasattr(arguments, "__post_init__"):
            arguments.__post_init__(self)
        if self.mm_vision_select_layer is not None:
            self.mm_vision_select_layer = Layers.parse(self.mm_vision_select_layer).select_layer
        check_arguments(self)
        check_start(self)

    extended = dataclasses.make_dataclass(
        arguments.__name__,
        extra,
        bases=(arguments,),
        namespace={"__post_init__": __post_init__, "__doc__": arguments.__doc__},
    )
    extended.__module__, extended.__qualname__ = arguments.__module__, arguments.__qualname__
    return extended


def check_arguments(arguments: Any) -> None:
    """Refuse settings of `ModelArguments` that can be known to be wrong before any weight is read.

    Raises:
        ValueError: see `MMFuserConfig`; or fuser settings given to another ``mm_projector_type``.
    """
    given = explicit_settings(arguments)
    lr = getattr(arguments, "mm_fuser_lr", None)
    if lr is not None and not 0 <= lr < float("inf"):
        raise ValueError(f"mm_fuser_lr={lr} is not allowed; use a number of at least 0, such as 1e-4")
    if arguments.mm_projector_type != PROJECTOR_TYPE:
        given.update({} if lr is None else {"lr": lr})
        if given:
            names = ", ".join(given["layers"].setting if name == "layers" else FLAG_PREFIX + name for name in given)
            raise ValueError(
                f"{names} was given, which needs mm_projector_type={PROJECTOR_TYPE}, but it is "
                f"{arguments.mm_projector_type!r}; add --mm_projector_type {PROJECTOR_TYPE} or drop the setting"
            )
        return
    settings = MMFuserConfig.from_llava(arguments)
    if {"fusion", "attention"} & set(given):  # else a checkpoint may say which
        settings.refuse_useless(given)
        refuse_together(settings.fusion, arguments)
    listed = arguments.mm_vision_select_layer
    if "layers" in given and isinstance(listed, tuple) and listed != given["layers"]:
        raise ValueError(
            f"mm_fuser_layers={spell(given['layers'])} and mm_vision_select_layer={spell(listed)} "
            f"name different layers; give one of them"
        )


@functools.lru_cache(maxsize=None)
def _with_flags(arguments: type) -> type:
    """LLaVA's `ModelArguments`, known by its fields because train.py defines it in ``__main__``, with our flags."""
    names = {f.name for f in dataclasses.fields(arguments)}
    if not {"mm_projector_type", "mm_vision_select_layer", "vision_tower"} <= names:
        return arguments
    return with_fuser_flags(arguments)


def parser_init(original, self, dataclass_types, *args, **kwargs):
    single = dataclasses.is_dataclass(dataclass_types)
    extended = [_with_flags(kind) for kind in ([dataclass_types] if single else dataclass_types)]
    original(self, extended[0] if single else extended, *args, **kwargs)
