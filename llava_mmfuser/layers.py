"""The `hidden_states` that are fused: reads every spelling and every named set, gives the indices in one tower."""

import contextlib
import re
from typing import Any, Iterable, List, Optional, Tuple, Union

from .block.kinds import MAX_LAYERS

NUM_UNIFORM_LAYERS = 5
LAYER_SETS = ("uniform", "shallow", "middle", "deep", "all")
SPELLINGS = '-2, 3,8,13,18,23, =-22,-17,-12,-7,-2, "3 8 13 18 23", [3,8,13,18,23] or list-22/-17/-12/-7/-2'


class Layers(tuple):
    """Indices of `hidden_states`, shallow first, the query last; or the query alone and the name of a set below it.

    Index 0 is the embedding output, i the output of block i. Negative indices count from the end.

    Attributes:
        name: one of `LAYER_SETS`, or None for listed layers. A query without a name gets ``uniform``.
        setting: the flag that gave the layers, for error messages.
    """

    name: Optional[str]
    setting: str

    def __new__(cls, indices: Iterable[int], name: Optional[str] = None, setting: str = "mm_fuser_layers") -> "Layers":
        layers = super().__new__(cls, indices)
        layers.name, layers.setting = name, setting
        return layers

    @classmethod
    def parse(cls, value: Any, setting: str = "mm_vision_select_layer") -> "Layers":
        """Read the query alone (an int or its text), or all layers (ints or their text in one of `SPELLINGS`)."""
        if isinstance(value, cls):
            return value
        items, alone = value, False
        if isinstance(value, str):
            text = value.strip().lstrip("=").strip()
            alone = not text.startswith(("list", "["))
            text = text[len("list") :] if text.startswith("list") else text.strip("[]()")
            found = [item for item in re.split(r"[,/\s]+", text.strip()) if item]
            items = [int(item) if re.fullmatch(r"[+-]?\d{1,9}", item) else None for item in found] or None
        elif isinstance(value, int):
            items, alone = [value], True
        if not isinstance(items, (list, tuple)) or any(not isinstance(i, int) or isinstance(i, bool) for i in items):
            raise ValueError(f"{setting}={value!r} is not a list of layers; write it as {SPELLINGS}")
        if alone and len(items) == 1:
            return cls(items, "uniform", setting)
        if len(items) < 2:
            raise ValueError(
                f"{setting}={cls(items)} names {len(items)} layer(s), but a fuser needs at least 2, the query last; "
                f"give the query alone as an int (-2) for the uniform default, or all layers, such as 3,8,13,18,23"
            )
        return cls(items, setting=setting)

    @classmethod
    def parse_listed(cls, value: Any, query: Any = None, setting: str = "mm_fuser_layers") -> "Layers":
        """Read ``mm_fuser_layers``: all layers as in `parse`, or a named set below the query (None: LLaVA-1.5's -2)."""
        name = value.strip().lower() if isinstance(value, str) else None
        if name in LAYER_SETS:
            query = cls.parse(-2 if query is None else query)
            if query.name is None:
                raise ValueError(
                    f"{setting}={value} and mm_vision_select_layer={query} both name layers; "
                    f"give the query alone in mm_vision_select_layer, such as {query[-1]}"
                )
            return cls(query, name, setting)
        if name and name.isalpha():
            raise ValueError(
                f"{setting}={value!r} is not a set of layers; use {' or '.join(LAYER_SETS)}, or a list: {SPELLINGS}"
            )
        layers = cls.parse(value, setting)
        return layers if layers.name is None else cls.parse(tuple(layers), setting)

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) and self.name == getattr(other, "name", None)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    def __str__(self) -> str:
        return self.name if self.name not in (None, "uniform") else ",".join(map(str, self))

    @property
    def select_layer(self) -> Union[int, Tuple[int, ...]]:
        """For LLaVA's ``mm_vision_select_layer``: the query of a named set, else all layers."""
        return self[-1] if self.name else tuple(self)

    @property
    def num_layers(self) -> int:
        """Number of layers. Only a tower can tell it for ``all`` below a negative query."""
        if self.name == "all" and self[-1] < 0:
            raise ValueError(
                f"mm_fuser_layers={self} below mm_vision_select_layer={self[-1]} has to be resolved for a vision "
                f"tower first; write the layers as a list, or the query as an index from 0"
            )
        return self[-1] + 1 if self.name == "all" else NUM_UNIFORM_LAYERS if self.name else len(self)

    def resolve(self, num_hidden_layers: int, num_deleted: int = 0) -> "Layers":
        """All layers as non-negative, ascending indices in one tower.

        The uniform set below ViT-L's 23 is 3, 8, 13, 18, 23 (paper, section 4.1).

        Args:
            num_hidden_layers: number of blocks n in the whole tower; valid indices are -(n+1) … n.
            num_deleted: number of last blocks that LLaVA deletes.
        """
        size = num_hidden_layers + 1
        for index in self:
            if not -size <= index < size:
                raise ValueError(
                    f"{self.setting}={self}: layer {index} does not exist; this vision tower has {num_hidden_layers} "
                    f"blocks, so hidden_states indices go from 0 to {num_hidden_layers} or from {-size} to -1"
                )
            if index % size > num_hidden_layers - num_deleted:
                raise ValueError(
                    f"{self.setting}={self}: layer {index} is not computed, because LLaVA deletes the last "
                    f"{num_deleted} of this vision tower's {num_hidden_layers} blocks; its own layer is "
                    f"{-1 - num_deleted}, which is also the last, so hidden_states indices go from 0 to "
                    f"{num_hidden_layers - num_deleted} or from {-size} to {-1 - num_deleted}"
                )
        resolved = [index % size for index in self]
        if self.name is None:
            self.check_order(resolved)
            return Layers(resolved, setting=self.setting)
        query = resolved[0]
        resolved = self._of_set(query)
        if resolved[0] < 0 or len(resolved) < 2 or resolved != sorted(set(resolved)):
            raise ValueError(
                f"{self.setting}={self}: there is no {self.name} set of layers below hidden_states[{query}]; "
                f"name the layers yourself, for example {self.setting}=0,{max(query, 1)}"
            )
        return Layers(resolved, setting=self.setting)

    def _of_set(self, query: int) -> List[int]:
        """The set below a non-negative query, and the query. Too shallow a query gives indices out of range or order.

        The paper compares such sets, but does not publish all indices.
        """
        below, stride = NUM_UNIFORM_LAYERS - 1, round(query / NUM_UNIFORM_LAYERS)
        first, step, count = {
            "uniform": (query - below * stride, stride, below),
            "shallow": (1, 1, below),
            "middle": ((query + 1 - below) // 2 if query > below else -1, 1, below),
            "deep": (query - below, 1, below),
            "all": (0, 1, query),
        }[str(self.name)]
        if count >= MAX_LAYERS:
            raise ValueError(f"mm_fuser_layers={self} below hidden_states[{query}] are more than {MAX_LAYERS} layers")
        return [*(first + step * i for i in range(count)), query]

    def check_order(self, resolved: Optional[Iterable[int]] = None) -> None:
        """Refuse listed layers unless they ascend.

        Args:
            resolved: their non-negative indices in one tower. None means an unknown tower: then negative layers are
                compared with negative ones only, and the others with the others.
        """
        places = tuple(self if resolved is None else resolved)
        indices = "" if places == tuple(self) else f" (as indices: {spell(places)})"
        kinds = [(layer < 0 if resolved is None else None) for layer in self]
        for kind in dict.fromkeys(kinds):
            of_kind = [(place, layer) for place, layer, own in zip(places, self, kinds) if own == kind]
            if len(dict(of_kind)) != len(of_kind):
                raise ValueError(f"{self.setting}={self} names a layer twice{indices}; every layer may appear once")
            if of_kind != sorted(of_kind):
                ordered = iter(sorted(of_kind))
                advice = spell([next(ordered)[1] if own == kind else layer for layer, own in zip(self, kinds)])
                rule = "write shallow to deep, the query layer last"
                raise ValueError(f"{self.setting}={self} is not in order{indices}; {rule}: {advice}")


def is_listed(value: Any) -> bool:
    """Whether a select layer is a list, in any spelling that `Layers.parse` reads."""
    with contextlib.suppress(ValueError):
        return Layers.parse(value).name is None
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and value.strip().startswith(("list", "[")))


def spell(value: Any) -> str:
    """A setting as on the command line: 3,8,13,18,23."""
    listed = isinstance(value, (list, tuple)) and not isinstance(value, Layers)
    return ",".join(map(str, value)) if listed else str(value)
