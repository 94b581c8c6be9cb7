"""Vision towers: what their config says, and several of their layers in one pass that ends at the deepest of them.

One row per kind of tower (`TOWERS`). Layers are indices of the `hidden_states` of the whole model, also where LLaVA's
tower deletes its last blocks: -2 is the map that LLaVA takes by default, of a SigLIP tower as of a CLIP tower.
"""

import functools
import os
import re
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .block.kinds import MAX_LAYERS, MAX_WIDTH, check_count
from .block.registration import is_compiling
from .block.sampling import is_recorded
from .config import PROJECTOR_TYPE, read_setting
from .patching import stand_in

SELECT_FEATURES = ("patch", "cls_patch")


class Tower(NamedTuple):
    """A row: one kind of vision tower."""

    model_types: Tuple[str, ...]  # in its config.json: of a whole model and of its vision part
    prefix: str  # of the names of transformers' classes
    on_hub: str  # expression that matches the names which LLaVA looks for on the hub
    has_cls: bool
    num_deleted: int  # blocks at the end that LLaVA's tower deletes
    tokens_first: bool  # whether a map in memory is [B, N, C]; a convolution that nothing follows leaves [B, C, N]
    masks: Tuple[str, ...]  # that a block takes after the hidden state; a vision tower has none
    embed: Callable[[Any, torch.Tensor], torch.Tensor]  # pictures to hidden_states[0], by what has the `encoder`

    def transformers_class(self, ending: str) -> Any:
        """Such as `CLIPVisionModel` for VisionModel."""
        import transformers

        return getattr(transformers, self.prefix + ending)


# fmt: off
TOWERS: Dict[str, Tower] = {
    "CLIP": Tower(("clip", "clip_vision_model"), "CLIP", r"openai|laion|.*ShareGPT4V", True, 0, True,
                  ("attention_mask", "causal_attention_mask"),
                  lambda vision, pixel_values: vision.pre_layrnorm(vision.embeddings(pixel_values))),
    "SigLIP": Tower(("siglip", "siglip_vision_model"), "Siglip", ".*siglip", False, 1, False, ("attention_mask",),
                    lambda vision, pixel_values: vision.embeddings(pixel_values)),
}
# fmt: on


class TowerConfig(NamedTuple):
    """What the settings of a fuser ask of a vision tower."""

    kind: str  # a key of `TOWERS`
    hidden_size: int
    num_hidden_layers: int  # blocks of the whole model
    num_deleted: int  # of them, at the end, that LLaVA's tower deletes


def kind_of(model_type: Any) -> Optional[str]:
    """The key in `TOWERS` of a config's ``model_type``; None without a row."""
    return next((kind for kind, row in TOWERS.items() if model_type in row.model_types), None)


def tower_config(name: str, local_files_only: bool = False) -> TowerConfig:
    """Read the config of a vision tower (folder or name on the hub); its weights are not read.

    Raises:
        ValueError: it cannot be found, or is of a kind without a row.
    """
    from transformers import PretrainedConfig

    try:
        found = PretrainedConfig.get_config_dict(name, local_files_only=local_files_only)[0].get("model_type")
        kind = kind_of(found)
        if kind is not None:
            row = TOWERS[kind]
            config = row.transformers_class("VisionConfig").from_pretrained(name, local_files_only=local_files_only)
            check_count(config.hidden_size, MAX_WIDTH, f"vision_tower={name!r}: hidden_size")
            check_count(config.num_hidden_layers, MAX_LAYERS, f"vision_tower={name!r}: num_hidden_layers")
            return TowerConfig(kind, config.hidden_size, config.num_hidden_layers, row.num_deleted)
    except (OSError, TypeError, AttributeError) as error:  # the last two of JSON that is no object
        reason = str(error).splitlines()[0]
        raise ValueError(f"the config of the vision tower {name!r} cannot be read: {reason}") from error
    raise ValueError(
        f"vision_tower={name!r} has model_type={found!r}, but mm_projector_type={PROJECTOR_TYPE} needs a "
        f"{' or '.join(TOWERS)} tower, such as openai/clip-vit-large-patch14-336"
    )


def check_features(source: Any, kind: Optional[str] = None) -> None:
    """Refuse a tower, a config (dict or object) or `ModelArguments` with which features come that no fuser can read.

    Args:
        source: has the settings.
        kind: of the tower, a key of `TOWERS`; None where it is not known.

    Raises:
        ValueError: ``s2``; ``mm_resampler_type``; a ``mm_vision_select_feature`` other than `SELECT_FEATURES`, or that
            the tower lacks.
    """
    if read_setting(source, "s2") or hasattr(source, "forward_feature"):  # several scales side by side
        raise ValueError(f"s2=True together with mm_projector_type={PROJECTOR_TYPE} is not supported; set s2 to False")
    select_feature = read_setting(source, "mm_vision_select_feature") or SELECT_FEATURES[0]
    if select_feature not in SELECT_FEATURES:
        allowed = " or ".join(SELECT_FEATURES)
        raise ValueError(f"mm_vision_select_feature={select_feature!r} is not allowed; use {allowed}")
    resampler = read_setting(source, "mm_resampler_type")
    if resampler is not None:
        raise ValueError(
            f"mm_resampler_type={resampler!r} together with mm_projector_type={PROJECTOR_TYPE} is not supported, "
            f"because LLaVA-NeXT takes the projector's width from it; drop the flag"
        )
    if kind is not None and select_feature != "patch" and not TOWERS[kind].has_cls:
        raise ValueError(f"mm_vision_select_feature={select_feature!r}, but a {kind} tower has no CLS; use patch")


def check_name(name: str, kind: str) -> None:
    """Refuse a tower that LLaVA would read as one of another kind.

    Raises:
        ValueError: a folder, which LLaVA always takes for a CLIP tower, with another kind of tower.
    """
    if kind != "CLIP" and os.path.exists(name):
        raise ValueError(
            f"vision_tower={name!r} is a folder with a {kind} tower, but LLaVA takes every folder for a CLIP tower; "
            f"LLaVA-NeXT knows a {kind} tower by its name on the hub, such as google/siglip-so400m-patch14-384, which "
            f"HF_HUB_OFFLINE=1 looks for in the cache alone"
        )


def local_tower(config: Mapping[str, Any]) -> Optional[TowerConfig]:
    """The config of a checkpoint's vision tower, or None where it is not on this machine."""
    try:
        return tower_config(str(config.get("mm_vision_tower")), local_files_only=True)
    except ValueError:
        return None


def check_tower_is_there(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose vision tower LLaVA would neither find on this machine nor look for on the hub.

    Raises:
        ValueError: a folder without a tower's config, or no folder and no name that `build_vision_tower` knows.
    """
    name = str(config.get("mm_vision_tower"))
    if os.path.exists(name):
        check_name(name, tower_config(name, local_files_only=True).kind)
    elif not any(re.match(row.on_hub, name) for row in TOWERS.values()):
        relative = "" if os.path.isabs(name) else f" (seen from {os.getcwd()})"
        raise ValueError(
            f"mm_vision_tower={name!r} in config.json is no folder on this machine{relative}, and LLaVA does not look "
            f"for it on the hub; write where the vision tower is"
        )


def select_tokens(hidden_state: torch.Tensor, select_feature: str, has_cls: bool = True) -> torch.Tensor:
    """LLaVA's ``mm_vision_select_feature``: drop CLS from [B, 1+N, C] (``patch``) or keep it (``cls_patch``). What a
    tower without CLS returns, [B, N, C], stays as it is.

    Raises:
        ValueError: another select_feature.
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(
            f"mm_vision_select_feature={select_feature!r} is not allowed; use {' or '.join(SELECT_FEATURES)}"
        )
    return hidden_state[:, 1:] if has_cls and select_feature == "patch" else hidden_state


def capture_layers(model: Any, pixel_values: torch.Tensor, layers: Sequence[int], select_feature: str) -> torch.Tensor:
    """Run a vision model up to the deepest requested layer and keep only the requested maps.

    The maps equal ``model(pixel_values, output_hidden_states=True).hidden_states[i]`` bit for bit; later blocks are not
    computed. Blocks are called one by one, so hooks that DeepSpeed or accelerate put on them run as usual; so does the
    model's own gradient checkpointing. Gradients flow unless the caller forbids it.

    Args:
        model: transformers' `CLIPVisionModel`, or another whose ``config.model_type`` has a row in `TOWERS`.
        pixel_values: [B, 3, image_size, image_size] in the model's dtype and device.
        layers: ascending, non-negative `hidden_states` indices; 0 is the embedding output.
        select_feature: ``patch`` or ``cls_patch``.

    Returns:
        [B, N, L*C]: the maps side by side on the channel axis, in the order of `layers`, in memory as the model's own
        maps are: see `Tower.tokens_first`; behind a CLS that is left out a view.
    """
    row, vision = TOWERS[str(kind_of(model.config.model_type))], getattr(model, "vision_model", model)  # flat since 5.x
    encoder, masks = vision.encoder, dict.fromkeys(row.masks)
    recompute = encoder.gradient_checkpointing and encoder.training and torch.is_grad_enabled()
    recompute = recompute and not hasattr(encoder.layers[0], "gradient_checkpointing")  # blocks do since 4.53
    in_place = not (is_recorded() or is_compiling() or torch.is_grad_enabled() and _has_graph(model, pixel_values))
    hidden = row.embed(vision, pixel_values)
    side, maps, out = 2 if row.tokens_first else 1, [], None  # the dimension along which maps are side by side
    for index in range(layers[-1] + 1):
        if index > 0 and recompute:
            run = getattr(encoder, "_gradient_checkpointing_func", checkpoint)  # transformers < 4.35 has no such name
            hidden = run(encoder.layers[index - 1].__call__, hidden, *masks.values())
        elif index > 0:
            hidden = encoder.layers[index - 1](hidden, **masks)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # some versions of transformers wrap it
        if index not in layers:
            continue
        kept = hidden if row.tokens_first else hidden.transpose(1, 2)
        if not in_place:
            maps.append(kept.to(pixel_values.device))
            continue
        if out is None:  # filled map by map: a concatenation at the end would hold all of them twice
            shape = [*kept.shape[:side], len(layers), *kept.shape[side:]]
            out = kept.new_empty(shape, device=pixel_values.device)
        out.select(side, layers.index(index)).copy_(kept)
    found = torch.cat(maps, dim=side) if out is None else out.flatten(side, side + 1)
    return select_tokens(found if row.tokens_first else found.transpose(1, 2), select_feature, row.has_cls)


def _has_graph(model: nn.Module, pixel_values: torch.Tensor) -> bool:
    return pixel_values.requires_grad or any(parameter.requires_grad for parameter in model.parameters())


def concat_layers(hidden_states: Sequence[torch.Tensor], layers: Sequence[int], select_feature: str) -> torch.Tensor:
    """The same [B, N, L*C] from all `hidden_states` of a model, for callers that already have them."""
    return torch.cat([select_tokens(hidden_states[index], select_feature) for index in layers], dim=-1)


def return_layers(tower: Any, layers: Sequence[int]) -> None:
    """Make a tower of LLaVA return these layers side by side, [B, N, L*C]; towers without this stay what they are.

    The tower becomes an instance of a subclass of its own class that bears the same name. Its `forward` is the host's
    own, so that dtypes, devices, lists of images and `torch.no_grad` are the host's affair; only the call of
    ``self.vision_tower`` in it is answered by `capture_layers`.

    Args:
        tower: has `vision_tower` (see `capture_layers`) and a `forward` that calls it and takes its last
            `hidden_states`, or gives the result to `feature_select`.
        layers: ascending, non-negative `hidden_states` indices.
    """
    tower.select_layer = list(layers)
    if not hasattr(tower, "_plain_class"):
        tower.__class__ = _returning_layers(tower.__class__)


@functools.lru_cache(maxsize=None)
def _returning_layers(kind: Any) -> type:
    def feature_select(self, image_forward_outs):
        if not isinstance(self.select_layer, list):
            return kind.feature_select(self, image_forward_outs)
        if isinstance(image_forward_outs, _Captured):
            return image_forward_outs.hidden_states[-1]
        return concat_layers(image_forward_outs.hidden_states, self.select_layer, self.select_feature)

    own = {
        "_plain_class": kind,
        "forward": _on_view(lambda: kind.forward),
        "__reduce_ex__": lambda self, protocol: (_unpickled, (kind,), *object.__reduce_ex__(self, 2)[2:]),
    }
    own.update({name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")})
    if hasattr(kind, "feature_select"):
        own["feature_select"] = stand_in(kind.feature_select, feature_select)
    return type(kind)(kind.__name__, (kind,), own)


def _unpickled(kind: Any) -> nn.Module:
    kind = _returning_layers(kind)
    return kind.__new__(kind)


def _on_view(forward: Callable[[], Any]) -> Callable:
    """The host's `forward`, as it is when it is called, for a `_View` of the tower; its ``__wrapped__`` likewise."""
    function: Any = stand_in(forward(), lambda self, *args, **kwargs: forward()(_View(self), *args, **kwargs))
    if hasattr(function, "__wrapped__"):
        function.__wrapped__ = _on_view(lambda: forward().__wrapped__)
    return function


class _Proxy:
    """Another object, but for the attributes of this class. `super()` and `isinstance` take it for that object."""

    _original: Any = None

    def __init__(self, original: Any):
        object.__setattr__(self, "_original", original)

    @property  # type: ignore[misc]  # of `object` it can be set, too
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


class _Captured(NamedTuple):
    """What a tower's own forward gets from its model."""

    hidden_states: Tuple[torch.Tensor]  # all layers side by side, which is the last one for who takes that


class _Capture(_Proxy):
    def __init__(self, tower: Any):
        super().__init__(tower.vision_tower)
        object.__setattr__(self, "_tower", tower)

    def __call__(self, pixel_values: torch.Tensor, **_: Any) -> _Captured:
        tower = self._tower
        select_feature = getattr(tower, "select_feature", "patch")
        return _Captured((capture_layers(tower.vision_tower, pixel_values, tower.select_layer, select_feature),))
