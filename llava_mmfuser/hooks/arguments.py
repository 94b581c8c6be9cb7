"""The command line of train.py, and its other ways to arguments: our flags beside the host's.

The host's `ModelArguments` keeps its class and its fields. A flag of ours that was given becomes an attribute of the
instance; whoever makes the arguments by hand sets the same attributes.
"""

import argparse
import dataclasses
from dataclasses import field
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from ..config import FLAG_PREFIX, MMFuserConfig
from ..layers import SPELLINGS, Layers
from .run import check_arguments, check_run

# name, type, default, help of flags that concern training only; upstream keeps mm_projector_lr in config.json, too
TRAINING_FLAGS: Tuple[Tuple[str, Any, Any, str], ...] = (
    (
        "mm_fuser_lr",
        Optional[float],
        None,
        "Learning rate of the fuser (paper, 13B pretraining: 1e-4). If not given: that of the projector.",
    ),
    (
        "mm_fuser_gate_lr",
        Optional[str],
        None,
        "Learning rate of what opens the fuser, its gates or columns: a number, or inherit, that of the rest. If not "
        "given: for a fresh fuser, without --mm_fuser_lr, one that can open it in the run's steps.",
    ),
    ("mm_fuser_log_gates", bool, True, "Log the mean absolute value of the fuser's gates with the loss."),
)
_OF_LLAVA = {"mm_projector_type", "mm_vision_select_layer", "vision_tower"}  # train.py defines its class in __main__


def _flags() -> type:
    fields: List[Tuple[str, Any, Any]] = []
    for name, kind, default, text in TRAINING_FLAGS:
        fields.append((name, kind, field(default=default, metadata={"help": text})))
    for setting in dataclasses.fields(MMFuserConfig):
        kind = str if setting.name == "layers" else setting.type
        fields.append(
            (FLAG_PREFIX + setting.name, Optional[kind], field(default=None, metadata=dict(setting.metadata)))
        )
    return dataclasses.make_dataclass("FuserArguments", fields)


FuserArguments = _flags()


def of_llava(self: Any, dataclass_types: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a parser is made for LLaVA's `ModelArguments`, among others."""
    types = [dataclass_types] if dataclasses.is_dataclass(dataclass_types) else list(dataclass_types)
    return any(_OF_LLAVA <= {f.name for f in dataclasses.fields(kind)} for kind in types)


def has_flags(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a parser has our flags."""
    return "--mm_fuser_layers" in self._option_string_actions


def parser_init(original, self, dataclass_types, *args, **kwargs):
    original(self, dataclass_types, *args, **kwargs)
    self._add_dataclass_arguments(FuserArguments)
    select_layer = self._option_string_actions["--mm_vision_select_layer"]
    select_layer.type = _or_layers(select_layer.type)
    select_layer.help = f"{select_layer.help or ''} Under mm_projector_type=mmfuser also a list: {SPELLINGS}".strip()


def _or_layers(host: Callable[[str], Any]) -> Callable[[str], Any]:
    """What the host makes of ``--mm_vision_select_layer``, else `Layers`."""

    def read(text: str) -> Any:
        try:
            return host(text)
        except (TypeError, ValueError):
            try:
                return Layers.parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error

    return read


def parse_args_into_dataclasses(original, self, *args, **kwargs):
    parsed = list(original(self, *args, **kwargs))
    namespace = next(part for part in parsed if isinstance(part, argparse.Namespace))  # what no dataclass of theirs has
    given = {f.name: vars(namespace).pop(f.name) for f in dataclasses.fields(FuserArguments)}
    if not vars(namespace):
        parsed.remove(namespace)
    return _finish(parsed, given)


def parse_dict(original, self, args, *rest, **kwargs):
    names = {f.name for f in dataclasses.fields(FuserArguments)}
    theirs = {name: value for name, value in args.items() if name not in names}
    return _finish(original(self, theirs, *rest, **kwargs), {name: args[name] for name in names & set(args)})


def _finish(parsed: Any, given: Mapping[str, Any]) -> Tuple[Any, ...]:
    """Set the flags that were given on `ModelArguments`, and check what can be known of the run."""
    model_args = next(part for part in parsed if all(hasattr(part, name) for name in _OF_LLAVA))
    defaults: Dict[str, Any] = {f.name: f.default for f in dataclasses.fields(FuserArguments)}
    flags = [name for name, value in given.items() if value != defaults[name]]
    for name in flags:
        setattr(model_args, name, given[name])
    layers = model_args.mm_vision_select_layer
    if isinstance(layers, Layers):  # which the host could not read
        model_args.mm_vision_select_layer = layers.select_layer
        flags.append("mm_vision_select_layer")
    check_arguments(model_args, flags)
    check_run(model_args, next((part for part in parsed if hasattr(part, "output_dir")), None))
    return tuple(parsed)
