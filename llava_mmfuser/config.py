"""Every setting of the fuser: default, help text, parsing, validation, and its place in a LLaVA config."""

import contextlib
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from .block.kinds import ATTENTION_KINDS, FUSIONS, MAX_LAYERS, check_num_heads, check_settings

PROJECTOR_TYPE = "mmfuser"
NUM_UNIFORM_LAYERS = 5
LAYER_SETS = ("uniform", "shallow", "middle", "deep", "all")
CLIP_TYPES = ("clip", "clip_vision_model")  # model_type of the vision towers that can be hooked
SPELLINGS = '-2, 3,8,13,18,23, =-22,-17,-12,-7,-2, "3 8 13 18 23", [3,8,13,18,23] or list-22/-17/-12/-7/-2'


@dataclass(frozen=True)
class LayerSet:
    """One of `LAYER_SETS` below a query layer; a plain int stands for the uniform set below it."""

    name: str
    query: int

    def __str__(self) -> str:
        return self.name

    @property
    def num_layers(self) -> int:
        """How many layers it has; of ``all`` below a query that counts from the end only the tower could tell."""
        if self.name == "all" and self.query < 0:
            raise ValueError(
                f"mm_fuser_layers={self} below mm_vision_select_layer={self.query} has to be resolved for a vision "
                f"tower first; write the layers as a list, or the query as an index from 0"
            )
        return self.query + 1 if self.name == "all" else NUM_UNIFORM_LAYERS

    def resolve(self, query: int) -> Tuple[int, ...]:
        """The set's `hidden_states` indices, the query last, for a non-negative query; out of range if it is shallow.

        With n = `NUM_UNIFORM_LAYERS` - 1 maps below query q (the paper compares such sets, but does not publish all
        indices): ``uniform`` has stride round(q / 5), ``shallow`` is 1 … n, ``deep`` q-n … q-1, ``middle`` the n in
        the middle of 1 … q-1, and ``all`` 0 … q.
        """
        below = NUM_UNIFORM_LAYERS - 1
        stride = round(query / NUM_UNIFORM_LAYERS)
        first, step, count = {
            "uniform": (query - below * stride, stride, below),
            "shallow": (1, 1, below),
            "middle": ((query + 1 - below) // 2 if query > below else -1, 1, below),
            "deep": (query - below, 1, below),
            "all": (0, 1, query),
        }[self.name]
        if count >= MAX_LAYERS:
            raise ValueError(f"mm_fuser_layers={self} below hidden_states[{query}] are more than {MAX_LAYERS} layers")
        return (*(first + step * i for i in range(count)), query)


Layers = Union[int, LayerSet, Tuple[int, ...]]


def parse_layers(value: Any, setting: str = "mm_vision_select_layer") -> Layers:
    """Read one `hidden_states` index or a list of them, in every spelling that people use.

    Args:
        value: an int; a list or tuple of ints; or a string such as ``-2``, ``3,8,13,18,23``, ``=-22,-17,-12,-7,-2``,
            ``"3 8 13 18 23"``, ``[3,8,13,18,23]`` or the authors' ``list-22/-17/-12/-7/-2``.
        setting: the name used in error messages.

    Returns:
        The int, or the tuple of ints in the given order.

    Raises:
        ValueError: the value cannot be read as layers, or names fewer than two of them in a list.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip().lstrip("=").strip()
        is_list = text.startswith(("list", "["))
        text = text[len("list") :] if text.startswith("list") else text.strip("[]()")
        items = [item for item in re.split(r"[,/\s]+", text.strip()) if item]
        if not items or not all(re.fullmatch(r"[+-]?\d{1,9}", item) for item in items):
            raise ValueError(f"{setting}={value!r} is not a list of layers; write it as {SPELLINGS}")
        layers = tuple(int(item) for item in items)
        if len(layers) == 1 and not is_list:
            return layers[0]
    elif isinstance(value, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        layers = tuple(value)
    else:
        raise ValueError(f"{setting}={value!r} is not a list of layers; write it as {SPELLINGS}")
    if len(layers) < 2:
        raise ValueError(
            f"{setting}={spell(layers)} names {len(layers)} layer(s), but a fuser needs at least 2, the query last; "
            f"give the query alone as an int (-2) for the uniform default, or all layers, such as 3,8,13,18,23"
        )
    return layers


def is_listed(value: Any) -> bool:
    """Whether a select layer, in any spelling that `parse_layers` reads, is a list."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = parse_layers(value)
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and value.strip().startswith(("list", "[")))


def parse_listed_layers(value: Any, query: Any = None) -> Layers:
    """As `parse_layers`, for ``mm_fuser_layers``: all layers, or one of `LAYER_SETS` below the query.

    Args:
        value: a list in any spelling, or the name of a set.
        query: ``mm_vision_select_layer``; None means LLaVA-1.5's -2.
    """
    name = value.strip().lower() if isinstance(value, str) else None
    if name in LAYER_SETS:
        query = -2 if query is None else parse_layers(query)
        if not isinstance(query, int):
            raise ValueError(
                f"mm_fuser_layers={value} and mm_vision_select_layer={spell(query)} both name layers; "
                f"give the query alone in mm_vision_select_layer, such as {query[-1]}"
            )
        return query if name == "uniform" else LayerSet(name, query)
    if name and name.isalpha():
        raise ValueError(
            f"mm_fuser_layers={value!r} is not a set of layers; use {' or '.join(LAYER_SETS)}, or a list: {SPELLINGS}"
        )
    layers = parse_layers(value, "mm_fuser_layers")
    return layers if isinstance(layers, tuple) else parse_layers((layers,), "mm_fuser_layers")


def resolve_layers(layers: Layers, num_hidden_layers: int, setting: str = "mm_vision_select_layer") -> Tuple[int, ...]:
    """Turn layers into non-negative, ascending `hidden_states` indices of one tower.

    A single query layer gets the uniform set below it: ViT-L's 23 gives 3, 8, 13, 18, 23 (paper, section 4.1; index 0
    is the embedding output, i the output of block i). `LayerSet.resolve` says what the other sets are.

    Args:
        layers: a query index, a set or all indices, shallow first, the query last; negative ones count from the end.
        num_hidden_layers: number of blocks of the tower; valid indices are -(n+1) … n.

    Raises:
        ValueError: an index out of range, duplicates, an order that is not shallow to deep, or a query so shallow that
            the set does not fit below it.
    """
    size = num_hidden_layers + 1
    layer_set = LayerSet("uniform", layers) if isinstance(layers, int) else layers
    named = isinstance(layer_set, LayerSet)
    given = (layer_set.query,) if named else layers
    for index in given:
        if not -size <= index < size:
            raise ValueError(
                f"{setting}={spell(layers)}: layer {index} does not exist; this vision tower has {num_hidden_layers} "
                f"blocks, so hidden_states indices go from 0 to {num_hidden_layers} or from {-size} to -1"
            )
    resolved = tuple(index % size for index in given)
    if named:
        query = resolved[0]
        resolved = layer_set.resolve(query)
        if resolved[0] < 0 or len(resolved) < 2 or list(resolved) != sorted(set(resolved)):
            raise ValueError(
                f"{setting}={spell(layers)}: there is no {layer_set.name} set of layers below hidden_states[{query}]; "
                f"name the layers yourself, for example {setting}=0,{max(query, 1)}"
            )
        return resolved
    check_order(layers, resolved, setting)
    return resolved


def check_order(layers: Tuple[int, ...], resolved: Optional[Tuple[int, ...]], setting: str) -> None:
    """Refuse listed layers unless they ascend; without a tower, as far as that can be known.

    Args:
        layers: as they were given.
        resolved: the same as non-negative indices of one tower; None where the tower's depth is unknown, so that
            negative layers can be compared only with each other, and so can the others.
        setting: the name used in error messages.
    """
    kinds = [(layer < 0 if resolved is None else None) for layer in layers]
    places = layers if resolved is None else resolved
    indices = "" if places == layers else f" (as indices: {spell(places)})"
    for kind in dict.fromkeys(kinds):
        of_kind = [(place, layer) for place, layer, own in zip(places, layers, kinds) if own == kind]
        if len({place for place, _ in of_kind}) != len(of_kind):
            raise ValueError(f"{setting}={spell(layers)} names a layer twice{indices}; every layer may appear once")
        if of_kind != sorted(of_kind):
            ordered = iter(sorted(of_kind))
            advice = [next(ordered)[1] if own == kind else layer for layer, own in zip(layers, kinds)]
            raise ValueError(
                f"{setting}={spell(layers)} is not in order{indices}; write shallow to deep, the query layer last: "
                f"{spell(advice)}"
            )


def spell(value: Any) -> str:
    """A setting as one would write it on the command line: 3,8,13,18,23."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class MMFuserConfig:
    """Settings of the fuser. In a LLaVA config and on the command line field ``x`` is called ``mm_fuser_x``.

    Raises:
        ValueError: a value that is not allowed, with the setting, the value and what is allowed.
    """

    layers: Layers = field(
        default=-2,
        metadata={
            "help": "hidden_states indices fed to the fuser, shallow first, the query layer last, or a set below "
            "--mm_vision_select_layer: %s. If not given: uniform." % ", ".join(LAYER_SETS)
        },
    )
    projector: str = field(
        default="mlp2x_gelu",
        metadata={"help": "LLaVA projector behind the fuser: linear or mlpNx_gelu. If not given: mlp2x_gelu."},
    )
    fusion: str = field(
        default="mmfuser",
        metadata={
            "help": "How the layers are fused: %s; all but mmfuser are simple baselines. If not given: mmfuser."
            % ", ".join(FUSIONS)
        },
    )
    attention: str = field(
        default="deformable",
        metadata={
            "help": "Attention kind inside the fuser: %s. If not given: deformable." % ", ".join(ATTENTION_KINDS)
        },
    )
    self_attention: bool = field(
        default=True, metadata={"help": "Refine the cross-attention's output by self-attention. If not given: True."}
    )
    num_heads: int = field(
        default=16, metadata={"help": "Attention heads; must divide the tower's width. If not given: 16."}
    )
    num_points: int = field(
        default=4, metadata={"help": "Sampling points per head and level of deformable attention. If not given: 4."}
    )
    window_size: int = field(
        default=3, metadata={"help": "Side of the neighbourhood in window attention, odd. If not given: 3."}
    )

    def __post_init__(self):
        if not isinstance(self.layers, LayerSet):
            object.__setattr__(self, "layers", parse_layers(self.layers, "mm_fuser_layers"))
        if not re.fullmatch(r"linear|mlp[1-9]\d?x_gelu", str(self.projector)):
            raise ValueError(
                f"mm_fuser_projector={self.projector!r} is not allowed; use linear or mlpNx_gelu with "
                f"N from 1 to 99, such as mlp2x_gelu"
            )
        check_settings(vars(self))

    @property
    def num_layers(self) -> int:
        """Number of feature maps: those of the list or set, or `NUM_UNIFORM_LAYERS` where only the query is given."""
        if isinstance(self.layers, LayerSet):
            return self.layers.num_layers
        return NUM_UNIFORM_LAYERS if isinstance(self.layers, int) else len(self.layers)

    @property
    def without_effect(self) -> Tuple[str, ...]:
        """Fields that mean nothing under this fusion and attention kind."""
        of_kinds = dict(ATTENTION_KINDS)
        if self.fusion == "mmfuser":
            del of_kinds[self.attention]
        unused = tuple(name for names in of_kinds.values() for name in names)
        return unused if self.fusion == "mmfuser" else ("attention", "self_attention", "num_heads", *unused)

    def refuse_useless(self, given: Dict[str, Any], arguments: Any = None) -> None:
        """Raise ValueError for settings the user gave (without prefix) that mean nothing here, and for `ModelArguments`
        that do not go together with this fusion."""
        for name in self.without_effect:
            if name in given:
                cause = "attention" if self.fusion == "mmfuser" else "fusion"
                raise ValueError(
                    f"mm_fuser_{name}={given[name]} has no effect with mm_fuser_{cause}={getattr(self, cause)}; drop it"
                )
        lr = getattr(arguments, "mm_fuser_lr", None)
        if lr is not None and not FUSIONS[self.fusion].has_weights:
            raise ValueError(f"mm_fuser_lr={lr} has no effect with mm_fuser_fusion={self.fusion}, which has no weights")
        merge_type = getattr(arguments, "mm_patch_merge_type", "flat")
        if self.fusion == "token_concat" and merge_type != "flat":
            raise ValueError(
                f"mm_patch_merge_type={merge_type} together with mm_fuser_fusion=token_concat is not supported, "
                f"because its tokens are no single map; use flat"
            )

    def build(self, hidden_size: int, out_features: int) -> Any:
        """A fresh fusion of these settings.

        Args:
            hidden_size: width of the feature maps.
            out_features: width of the first layer of the projector behind it.

        Raises:
            ValueError: heads that do not divide the width.
        """
        from .block.rivals import build_fusion

        names = ("num_heads", "num_points", "attention", "self_attention", "window_size")
        of_mmfuser = {name: getattr(self, name) for name in names}
        return build_fusion(self.fusion, hidden_size, self.num_layers, out_features, **of_mmfuser)

    def summary(self) -> str:
        """Layers and fusion in a few words."""
        if self.fusion != "mmfuser":
            return f"hidden_states {spell(self.layers)} -> {self.fusion}"
        own = "".join(f", {name} {getattr(self, name)}" for name in ATTENTION_KINDS[self.attention])
        return (
            f"hidden_states {spell(self.layers)} -> {self.attention} attention"
            f"{' + self-attention' if self.self_attention else ''}, num_heads {self.num_heads}{own}"
        )

    def resolve(self, vision_config: Any, setting: str = "mm_fuser_layers") -> "MMFuserConfig":
        """Check the settings against a CLIP vision config and return them with explicit, non-negative layers.

        `setting` is the name that the layers were given under, for error messages; see `layers_setting`.

        Raises:
            ValueError: layers that the tower does not have, or heads that do not divide its width.
        """
        if self.fusion == "mmfuser":
            check_num_heads(vision_config.hidden_size, self.num_heads)
        layers = resolve_layers(self.layers, vision_config.num_hidden_layers, setting)
        return dataclasses.replace(self, layers=layers)

    @classmethod
    def from_llava(cls, source: Any) -> "MMFuserConfig":
        """Read the ``mm_fuser_*`` settings of a LLaVA config, a config.json (dict) or `ModelArguments`; absent or None
        means default.

        The layers are ``mm_fuser_layers``, else ``mm_vision_select_layer``.
        """
        given = {f.name: read_setting(source, FLAG_PREFIX + f.name) for f in dataclasses.fields(cls)}
        if given["layers"] is None:
            select_layer = read_setting(source, "mm_vision_select_layer")
            given["layers"] = None if select_layer is None else parse_layers(select_layer)
        else:
            given["layers"] = parse_listed_layers(given["layers"], read_setting(source, "mm_vision_select_layer"))
        return cls(**{name: value for name, value in given.items() if value is not None})

    def difference(self, other: "MMFuserConfig") -> Optional[str]:
        """The first field with another value in `other`, or None; fields that mean nothing here do not count."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.without_effect]
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def to_llava(self) -> Dict[str, Any]:
        """The flat ``mm_fuser_*`` keys for ``config.json``; call it on what `resolve` returned."""
        flat = {FLAG_PREFIX + f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        flat["mm_fuser_layers"] = list(self.layers)
        return flat


FLAG_PREFIX = "mm_fuser_"
# name, type, default, help of flags that concern training only; upstream keeps mm_projector_lr in config.json, too
TRAINING_FLAGS = (
    (
        "mm_fuser_lr",
        Optional[float],
        None,
        "Learning rate of the fuser (paper, 13B pretraining: 1e-4). If not given: that of the projector.",
    ),
    ("mm_fuser_log_gates", bool, True, "Log the mean absolute value of the fuser's gates with the loss."),
)


def read_setting(source: Any, name: str) -> Any:
    """A setting of a LLaVA config, a config.json (dict) or `ModelArguments`; None where it is absent."""
    return source.get(name) if isinstance(source, dict) else getattr(source, name, None)


def check_tower(config: Any, vision_config: Any) -> None:
    """Refuse a config.json (dict or object) of a LLaVA with fuser whose vision tower is not the one it describes.

    Raises:
        ValueError: ``mm_hidden_size`` is not the tower's width; ``mm_vision_select_layer`` is absent, or another layer
            of this tower than the last of ``mm_fuser_layers``, as after exchanging the tower or editing one of the two.
    """
    width = read_setting(config, "mm_hidden_size")
    name = read_setting(config, "mm_vision_tower")
    if width is not None and width != vision_config.hidden_size:
        raise ValueError(
            f"mm_hidden_size={width!r}, but mm_vision_tower={name!r} has width {vision_config.hidden_size}; name the "
            f"vision tower that the fuser was trained with"
        )
    listed, select_layer = read_setting(config, "mm_fuser_layers"), read_setting(config, "mm_vision_select_layer")
    if select_layer is None:
        raise ValueError("config.json has no mm_vision_select_layer, which LLaVA asks for; write the query layer there")
    if listed is None:
        return
    blocks, query = vision_config.num_hidden_layers, parse_layers(select_layer)
    layers = resolve_layers(parse_listed_layers(listed, select_layer), blocks, "mm_fuser_layers")
    if isinstance(query, int):
        same = resolve_layers((query,), blocks)[0] == layers[-1]
    else:
        same = resolve_layers(query, blocks) == layers
    if not same:
        raise ValueError(
            f"mm_fuser_layers={spell(listed)} and mm_vision_select_layer={spell(query)} do not end at the same layer "
            f"of mm_vision_tower={name!r}, which has {blocks} blocks; undo what was changed: the layers, the query, or "
            f"the tower. If the layers are right, write mm_vision_select_layer: {layers[-1]}"
        )


def layers_setting(source: Any) -> str:
    """The setting that names the layers in `source`: ``mm_fuser_layers`` if given, else ``mm_vision_select_layer``."""
    return "mm_vision_select_layer" if read_setting(source, "mm_fuser_layers") is None else "mm_fuser_layers"


def explicit_settings(source: Any) -> Dict[str, Any]:
    """The ``mm_fuser_*`` settings that the user gave, without the prefix; layers also from a listed select layer."""
    given = {f.name: getattr(source, FLAG_PREFIX + f.name, None) for f in dataclasses.fields(MMFuserConfig)}
    select_layer = getattr(source, "mm_vision_select_layer", None)
    if given["layers"] is None and select_layer is not None:
        select_layer = parse_layers(select_layer)
        given["layers"] = None if isinstance(select_layer, int) else select_layer
    elif given["layers"] is not None:
        given["layers"] = parse_listed_layers(given["layers"], select_layer)
    return {name: value for name, value in given.items() if value is not None}


def with_fuser_flags(arguments: type, check: Callable[[Any], None]) -> type:
    """Extend LLaVA's `ModelArguments` with the ``mm_fuser_*`` flags and a select layer that may be a list.

    Args:
        arguments: a dataclass type with ``mm_projector_type`` and ``mm_vision_select_layer``.
        check: called with every new instance; raises ValueError for settings that are not allowed.

    Returns:
        A subclass under the same name. Its ``mm_vision_select_layer`` is an int, as upstream's, or a tuple of ints;
        every setting of `MMFuserConfig` is None unless given. The `TRAINING_FLAGS` are there, too.
    """
    select_layer = arguments.__dataclass_fields__["mm_vision_select_layer"]
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
            self.mm_vision_select_layer = parse_layers(self.mm_vision_select_layer)
        check(self)

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
            names = ", ".join(layers_setting(arguments) if name == "layers" else FLAG_PREFIX + name for name in given)
            raise ValueError(
                f"{names} was given, which needs mm_projector_type={PROJECTOR_TYPE}, but it is "
                f"{arguments.mm_projector_type!r}; add --mm_projector_type {PROJECTOR_TYPE} or drop the setting"
            )
        return
    settings = MMFuserConfig.from_llava(arguments)
    if {"fusion", "attention"} & set(given):  # else a checkpoint may say which
        settings.refuse_useless(given, arguments)
    listed = arguments.mm_vision_select_layer
    if "layers" in given and isinstance(listed, tuple) and listed != given["layers"]:
        raise ValueError(
            f"mm_fuser_layers={spell(given['layers'])} and mm_vision_select_layer={spell(listed)} "
            f"name different layers; give one of them"
        )
