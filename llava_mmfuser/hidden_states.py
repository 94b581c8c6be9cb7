"""Reads several `hidden_states` of a vision tower in one pass, with the tower's own code.

The ViT runs once and ends at the deepest fused block. The tower's `forward` and `feature_select` run once per fused
layer, each time as if the ViT ended there. So every map gets the treatment of LLaVA's one map.
"""

import functools
import inspect
import itertools
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import nn

from .block.registration import is_compiling
from .block.sampling import is_recorded
from .config import PROJECTOR_TYPE
from .patching import stand_in
from .towers import TOWERS, kind_of, select_tokens


def return_layers(tower: Any, layers: Sequence[int]) -> None:
    """Make one tower of LLaVA return these layers side by side, [B, N, L*C]. Other towers do not change.

    The tower's class becomes a subclass with the same name. The tower's ``select_layer`` becomes the list of layers; an
    int there restores the old behaviour.

    Args:
        tower: its `vision_tower` is a ViT of transformers. Its `forward` calls ``self.vision_tower(…)`` and reads
            ``hidden_states[self.select_layer]`` or ``hidden_states[-1]`` of the output.
        layers: ascending, non-negative `hidden_states` indices.
    """
    tower.select_layer = list(layers)
    if not hasattr(tower, "_plain_class"):
        tower.__class__ = _returning_layers(tower.__class__)


def capture_layers(model: Any, pixel_values: torch.Tensor, layers: Sequence[int], select_feature: str) -> torch.Tensor:
    """Run a vision model, without LLaVA's tower around it, up to the deepest of these layers.

    Args:
        model: a vision model of transformers whose ``config.model_type`` has a row in `TOWERS`.
        pixel_values: [B, 3, image_size, image_size] in the model's dtype and device.
        layers: ascending, non-negative `hidden_states` indices; 0 is the embedding output.
        select_feature: ``patch`` or ``cls_patch``.

    Returns:
        [B, N, L*C]: the maps side by side, in the order of `layers`, bit-equal to the model's ``hidden_states``.
    """
    has_cls = TOWERS[str(kind_of(model.config.model_type))].has_cls
    _, states = _run(model, layers, (pixel_values,), {})
    return _side_by_side([select_tokens(states[layer], select_feature, has_cls) for layer in layers])


@functools.lru_cache(maxsize=None)
def _returning_layers(kind: Any) -> type:
    def feature_select(self, image_forward_outs):
        if not isinstance(self.select_layer, list):
            return kind.feature_select(self, image_forward_outs)
        views = (_View(self, self.vision_tower, layer) for layer in self.select_layer)
        return _side_by_side([kind.feature_select(view, image_forward_outs) for view in views])

    own = {
        "_plain_class": kind,
        "forward": _once_per_layer(lambda: kind.forward),
        "__reduce_ex__": lambda self, protocol: (_unpickled, (kind,), *object.__reduce_ex__(self, 2)[2:]),
    }
    own.update({name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")})
    if hasattr(kind, "feature_select"):
        own["feature_select"] = stand_in(kind.feature_select, feature_select)
    return type(kind)(kind.__name__, (kind,), own)


def _unpickled(kind: Any) -> nn.Module:
    kind = _returning_layers(kind)
    return kind.__new__(kind)


def _once_per_layer(forward: Callable[[], Any]) -> Callable:
    """A `forward` that runs the host's present `forward` once per layer; its ``__wrapped__`` does the same."""

    def call(self, *args, **kwargs):
        layers = self.select_layer
        if not isinstance(layers, list):
            return forward()(self, *args, **kwargs)
        runs: List[Any] = []
        found = []
        for layer in layers:
            found.append(forward()(_View(self, _Answering(self, layer, runs), layer), *args, **kwargs))
        name = f"{type(self).__name__}.forward"
        if not runs:
            raise ValueError(
                f"{name} does not call self.vision_tower(…), so that mm_projector_type={PROJECTOR_TYPE} cannot give it "
                f"the layers {layers}; let it call the ViT, or write --mm_projector_type mlp2x_gelu"
            )
        if all(isinstance(one, list) for one in found):
            return [_side_by_side(maps, name) for maps in zip(*found)]
        return _side_by_side(found, name)

    function: Any = stand_in(forward(), call)
    if hasattr(function, "__wrapped__"):
        function.__wrapped__ = _once_per_layer(lambda: forward().__wrapped__)
    return function


class _Proxy:
    """Stands for another object, except for the attributes of this class; `super()` and `isinstance` see the object."""

    _original: Any = None

    def __init__(self, original: Any):
        object.__setattr__(self, "_original", original)

    @property  # type: ignore[misc]  # mypy: `object` has a setter, too
    def __class__(self) -> type:
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


class _View(_Proxy):
    """The `self` of a tower's methods in the pass of one layer.

    The tower itself does not change, because several threads may run it.
    """

    vision_tower: Any = None
    select_layer: int = 0

    def __init__(self, tower: Any, vision_tower: Any, layer: int):
        super().__init__(tower)
        object.__setattr__(self, "vision_tower", vision_tower)
        object.__setattr__(self, "select_layer", layer)

    def __getattr__(self, name: str) -> Any:
        method: Any = getattr(type(self._original), name, None)
        own = inspect.isfunction(method) and name not in vars(self._original)
        return functools.partial(method, self) if own else getattr(self._original, name)


class _Answering(_Proxy):
    """The ViT that a tower's `forward` calls in the pass of one layer.

    The first pass runs the ViT and appends to `runs`. Later passes read `runs`.
    """

    def __init__(self, tower: Any, layer: int, runs: List[Any]):
        super().__init__(tower.vision_tower)
        again = None if layer == tower.select_layer[0] else iter(runs)
        for name, value in (("_tower", tower), ("_layer", layer), ("_runs", runs), ("_again", again)):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._again is None:
            run = _run(self._original, self._tower.select_layer, args, kwargs)
            self._runs.append(run)
        else:
            run = next(self._again)
        output, states = run
        return _ending_at(self._layer, output, states, type(self._tower).__name__)


def _run(
    vit: Any, layers: Sequence[int], args: Tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tuple[Any, Mapping[int, torch.Tensor]]:
    """Call a ViT once. Returns its output and a dict from index to hidden state, with at least these layers.

    Blocks behind the deepest layer run only where their result is needed: for further outputs, or for a hook on the ViT
    or its encoder. Without a recorded graph, only these layers are kept.
    """
    vision = getattr(vit, "vision_model", vit)  # flat since transformers 5
    encoder, graph = vision.encoder, is_recorded() or is_compiling()
    kwargs = {**kwargs, "output_hidden_states": True}
    others = any(value for name, value in kwargs.items() if name.startswith("output_") and "hidden" not in name)
    whole = graph or others or getattr(vit.config, "output_attentions", False)
    whole = whole or any(map(_has_hooks, (vit, vision, encoder)))
    natural = whole or any(map(_has_hooks, encoder.layers)) or (torch.is_grad_enabled() and _has_graph(vit, args))
    if not whole and type(encoder.layers) is nn.ModuleList:
        encoder.layers.__class__ = _Blocks
    if graph:
        output = vit(*args, **kwargs)
        return output, dict(enumerate(output.hidden_states))
    before = _state.depth, _state.kept
    try:
        _state.depth = None if whole else layers[-1]
        if natural:
            output = vit(*args, **kwargs)
            return output, dict(enumerate(output.hidden_states))
        kept = _Kept(list(encoder.layers), layers)
        _state.kept = kept
        output = vit(*args, **{**kwargs, "output_hidden_states": False})
        return output, kept.maps()
    finally:
        _state.depth, _state.kept = before


def _has_graph(vit: nn.Module, args: Sequence[Any]) -> bool:
    return any(tensor.requires_grad for tensor in itertools.chain(vit.parameters(), args) if torch.is_tensor(tensor))


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than ours and DeepSpeed's, which gather weights."""
    hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith(("deepspeed.", __name__)) for hook in hooks)


class _State(threading.local):
    """State of the ViT that runs in this thread."""

    depth: Optional[int] = None  # number of blocks that run; None means all
    kept: Optional["_Kept"] = None


_state = _State()


class _Blocks(nn.ModuleList):
    """``encoder.layers``; while a tower with a fuser runs, it ends at the deepest fused block."""

    def __iter__(self):
        return itertools.islice(super().__iter__(), None if is_compiling() else _state.depth)


class _Kept:
    """Hidden states of one run, written side by side into one tensor. A concatenation would need twice the memory.

    Args:
        blocks: all blocks of the ViT.
        layers: ascending indices to keep.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Sequence[int]):
        self.layers = list(layers)
        self.out: Optional[torch.Tensor] = None
        self.places = {id(blocks[layer - 1]): place for place, layer in enumerate(layers) if layer > 0}
        self.first = id(blocks[0]) if layers[0] == 0 else None
        for block in blocks[: layers[-1]]:
            if _keep_output not in block._forward_hooks.values():
                block.register_forward_pre_hook(_keep_input, with_kwargs=True)
                block.register_forward_hook(_keep_output)

    def write(self, place: int, hidden: torch.Tensor) -> None:
        """Copy one hidden state [B, N, C] to its place."""
        if self.out is None:
            # The same memory order as the ViT's: [B, N, C], or [B, C, N] after a convolution.
            self.dim = 2 if hidden.stride(2) == 1 else 1
            shape = list(hidden.shape if self.dim == 2 else hidden.transpose(1, 2).shape)
            self.out = hidden.new_empty(shape[: self.dim] + [len(self.layers)] + shape[self.dim :])
        self.out.select(self.dim, place).copy_(hidden if self.dim == 2 else hidden.transpose(1, 2))

    def maps(self) -> Dict[int, torch.Tensor]:
        """Layer to [B, N, C], views of one tensor."""
        assert self.out is not None
        maps = [self.out.select(self.dim, place) for place in range(len(self.layers))]
        return dict(zip(self.layers, maps if self.dim == 2 else [one.transpose(1, 2) for one in maps]))


def _keep_input(block: nn.Module, args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    kept = _state.kept
    if kept is not None and kept.first == id(block):
        kept.write(0, args[0] if args else kwargs["hidden_states"])


def _keep_output(block: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
    kept = _state.kept
    if kept is not None and id(block) in kept.places:
        kept.write(kept.places[id(block)], output[0] if isinstance(output, tuple) else output)


def _ending_at(layer: int, output: Any, states: Mapping[int, torch.Tensor], tower: str) -> Any:
    """The output of a ViT as if it ended at this layer. Reading a part that was not computed raises an error."""

    def absent(name: str) -> "_Absent":
        return _Absent(f"{tower} reads {name} of its ViT")

    found = {**output, "hidden_states": tuple(states.get(i, absent(f"hidden_states[{i}]")) for i in range(layer + 1))}
    if not is_compiling():
        found["last_hidden_state"] = absent("last_hidden_state")
        if not output.get("attentions") and "pooler_output" in output:
            found["pooler_output"] = absent("pooler_output")
    return type(output)(**found)


class _Absent:
    def __init__(self, reading: str):
        self._reading = reading

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self._reading}, which mm_projector_type={PROJECTOR_TYPE} does not compute: the ViT ends at the deepest "
            f"fused layer. Read hidden_states[self.select_layer], or write --mm_projector_type mlp2x_gelu"
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("")


def _side_by_side(maps: Sequence[Any], method: str = "the vision tower") -> torch.Tensor:
    """Maps [B, N, C] as one [B, N, L*C]: a view where memory allows it, else a concatenation.

    Raises:
        ValueError: these are not maps of one shape.
    """
    first = maps[0]
    if not all(torch.is_tensor(one) and one.dim() == 3 and one.shape == first.shape for one in maps):
        kinds = [list(one.shape) if torch.is_tensor(one) else type(one).__name__ for one in maps]
        raise ValueError(
            f"{method} returns {', '.join(map(str, kinds))} for the fused layers, but mm_projector_type="
            f"{PROJECTOR_TYPE} needs maps [B, N, C] of one shape; write --mm_projector_type mlp2x_gelu"
        )
    batch, tokens, width = first.shape
    if not (is_recorded() or is_compiling() or any(one.requires_grad for one in maps)):
        storage, step = first.untyped_storage().data_ptr(), width * first.stride(2)
        places = [(one.untyped_storage().data_ptr(), one.storage_offset(), one.stride()) for one in maps]
        wanted = [(storage, first.storage_offset() + i * step, first.stride()) for i in range(len(maps))]
        if places == wanted:
            return first.as_strided((batch, tokens, len(maps) * width), first.stride(), first.storage_offset())
    if first.stride(2) == 1:
        return torch.cat(list(maps), dim=2)
    return torch.cat([one.transpose(1, 2) for one in maps], dim=1).transpose(1, 2)
