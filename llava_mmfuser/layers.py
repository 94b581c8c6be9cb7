"""Which `hidden_states` of a vision tower are fused: every spelling, the named sets, one tower's indices."""

import contextlib
import re
from dataclasses import dataclass
from typing import Any, Optional, Tuple, Union

from .block.kinds import MAX_LAYERS

NUM_UNIFORM_LAYERS = 5
LAYER_SETS = ("uniform", "shallow", "middle", "deep", "all")
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
