"""Several layers of a ViT in one pass that ends at the deepest of them. Knows transformers' CLIP, not LLaVA."""

import functools
from typing import Any, Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .block.operator import is_compiling
from .block.sampling import is_recorded
from .patching import stand_in

SELECT_FEATURES = ("patch", "cls_patch")


def select_tokens(hidden_state: torch.Tensor, select_feature: str) -> torch.Tensor:
    """LLaVA's ``mm_vision_select_feature``: drop CLS from [B, 1+N, C] (``patch``) or keep it (``cls_patch``).

    Raises:
        ValueError: another select_feature.
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(
            f"mm_vision_select_feature={select_feature!r} is not allowed; use {' or '.join(SELECT_FEATURES)}"
        )
    return hidden_state[:, 1:] if select_feature == "patch" else hidden_state


def capture_layers(model: Any, pixel_values: torch.Tensor, layers: Sequence[int], select_feature: str) -> torch.Tensor:
    """Run a `CLIPVisionModel` up to the deepest requested layer and keep only the requested maps.

    The maps equal ``model(pixel_values, output_hidden_states=True).hidden_states[i]`` bit for bit; later blocks are not
    computed. Blocks are called one by one, so hooks that DeepSpeed or accelerate put on them run as usual; so does the
    model's own gradient checkpointing. Gradients flow unless the caller forbids it.

    Args:
        model: transformers' `CLIPVisionModel`.
        pixel_values: [B, 3, image_size, image_size] in the model's dtype and device.
        layers: ascending, non-negative `hidden_states` indices; 0 is the embedding output.
        select_feature: ``patch`` or ``cls_patch``.

    Returns:
        [B, N, L*C]: the maps side by side on the channel axis, in the order of `layers`.
    """
    vision, encoder = model.vision_model, model.vision_model.encoder
    recompute = encoder.gradient_checkpointing and encoder.training and torch.is_grad_enabled()
    in_place = not (is_recorded() or is_compiling() or torch.is_grad_enabled() and _has_graph(model, pixel_values))
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
    maps, out = [], None
    for index in range(layers[-1] + 1):
        if index > 0 and recompute:
            run = getattr(encoder, "_gradient_checkpointing_func", checkpoint)  # transformers < 4.35 has no such name
            hidden = run(encoder.layers[index - 1].__call__, hidden, None, None)[0]
        elif index > 0:
            hidden = encoder.layers[index - 1](hidden, attention_mask=None, causal_attention_mask=None)[0]
        if index not in layers:
            continue
        tokens = select_tokens(hidden, select_feature)
        if not in_place:
            maps.append(tokens.to(pixel_values.device))
            continue
        if out is None:  # filled map by map: a concatenation at the end would hold all of them twice
            out = tokens.new_empty(*tokens.shape[:2], len(layers), tokens.shape[2], device=pixel_values.device)
        out[:, :, layers.index(index)] = tokens
    return out.flatten(2) if in_place else torch.cat(maps, dim=-1)


def _has_graph(model: nn.Module, pixel_values: torch.Tensor) -> bool:
    return pixel_values.requires_grad or any(parameter.requires_grad for parameter in model.parameters())


def concat_layers(hidden_states: Sequence[torch.Tensor], layers: Sequence[int], select_feature: str) -> torch.Tensor:
    """The same [B, N, L*C] from all `hidden_states` of a model, for callers that already have them."""
    return torch.cat([select_tokens(hidden_states[index], select_feature) for index in layers], dim=-1)


def return_layers(tower: nn.Module, layers: Sequence[int]) -> None:
    """Make a tower of LLaVA return these layers side by side, [B, N, L*C]; towers without this stay what they are.

    The tower becomes an instance of a subclass of its own class that bears the same name. Its `forward` is the host's
    own, so that dtypes, devices, lists of images and `torch.no_grad` are the host's affair; only the call of
    ``self.vision_tower`` in it is answered by `capture_layers`.

    Args:
        tower: has `vision_tower` (a `CLIPVisionModel`), `select_feature`, and a `forward` that calls the one and gives
            the result to `feature_select`.
        layers: ascending, non-negative `hidden_states` indices.
    """
    tower.select_layer = list(layers)
    if not hasattr(tower, "_plain_class"):
        tower.__class__ = _returning_layers(type(tower))


@functools.lru_cache(maxsize=None)
def _returning_layers(kind: type) -> type:
    def feature_select(self, image_forward_outs):
        if not isinstance(self.select_layer, list):
            return kind.feature_select(self, image_forward_outs)
        if isinstance(image_forward_outs, torch.Tensor):  # what _Capture returned
            return image_forward_outs
        return concat_layers(image_forward_outs.hidden_states, self.select_layer, self.select_feature)

    own = {
        "_plain_class": kind,
        "forward": _on_view(lambda: kind.forward),
        "feature_select": stand_in(kind.feature_select, feature_select),
        "__reduce_ex__": lambda self, protocol: (_unpickled, (kind,), *object.__reduce_ex__(self, 2)[2:]),
    }
    own.update({name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")})
    return type(kind)(kind.__name__, (kind,), own)


def _unpickled(kind: type) -> nn.Module:
    kind = _returning_layers(kind)
    return kind.__new__(kind)


def _on_view(forward: Callable[[], Callable]) -> Callable:
    """The host's `forward`, as it is when it is called, for a `_View` of the tower; its ``__wrapped__`` likewise."""
    function = stand_in(forward(), lambda self, *args, **kwargs: forward()(_View(self), *args, **kwargs))
    if hasattr(function, "__wrapped__"):
        function.__wrapped__ = _on_view(lambda: forward().__wrapped__)
    return function


class _Proxy:
    """Another object, but for the attributes of this class. `super()` and `isinstance` take it for that object."""

    _original = None

    def __init__(self, original: Any):
        object.__setattr__(self, "_original", original)

    @property
    def __class__(self) -> type:
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


class _View(_Proxy):
    """What a tower's own forward sees as `self`. Nothing of the tower changes, as several threads may run it."""

    @property
    def vision_tower(self) -> Any:
        tower = self._original
        return _Capture(tower) if isinstance(tower.select_layer, list) else tower.vision_tower


class _Capture(_Proxy):
    def __init__(self, tower: Any):
        super().__init__(tower.vision_tower)
        object.__setattr__(self, "_tower", tower)

    def __call__(self, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        tower = self._tower
        return capture_layers(tower.vision_tower, pixel_values, tower.select_layer, tower.select_feature)
