"""Whether a config.json, weights and a vision tower belong together, and under which settings they would."""

import contextlib
import dataclasses
import itertools
import os
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence

import torch

from ..block.kinds import ATTENTION_KINDS, FUSIONS, MAX_WIDTH, check_count
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig, read_setting
from ..layers import Layers, spell
from ..names import (
    MARK,
    Shapes,
    compare,
    differences,
    expected_shapes,
    inner_projector,
    is_authors_config,
)
from ..towers import local_tower
from .files import DTYPES, Weight, projector_weights, read_weights


def settings_of(config: Mapping[str, Any]) -> MMFuserConfig:
    """The fuser's settings in a config.json of any format; of plain LLaVA only the projector means something.

    Raises:
        ValueError: a setting that is not allowed.
    """
    if config.get("mm_projector_type") == PROJECTOR_TYPE:
        return MMFuserConfig.from_llava(config)
    projector = config.get("mm_projector_type", "linear")
    if is_authors_config(config):
        return MMFuserConfig(layers=Layers.parse(config["mm_vision_select_layer"]), projector=projector)
    return MMFuserConfig(projector=projector)


def projector_shapes(config: Mapping[str, Any], settings: MMFuserConfig) -> Shapes:
    """`expected_shapes` with the widths in a config.json.

    Raises:
        ValueError: the config lacks a width, or has one that the heads do not divide.
    """
    for name in ("mm_hidden_size", "hidden_size"):
        check_count(config.get(name), MAX_WIDTH, f"config.json: {name}")
    return expected_shapes(settings, config["mm_hidden_size"], config["hidden_size"])


def check_layers(config: Mapping[str, Any], settings: MMFuserConfig) -> bool:
    """Check layers against the checkpoint's tower; without it, their order as far as it can be known.

    Returns:
        Whether the tower's config is on this machine.

    Raises:
        ValueError: see `MMFuserConfig.resolve`.
    """
    tower = local_tower(config)
    if tower is not None:
        settings.resolve(tower)
    elif settings.layers.name is None:
        settings.layers.check_order()
    return tower is not None


def misfit(
    config: Mapping[str, Any], weights: Mapping[str, Weight], expected: Optional[Shapes] = None
) -> Optional[str]:
    """Why a projector's weights do not fit a config.json, and under which settings they would; None if they do.

    Args:
        config: of plain LLaVA, of our format, or the authors'.
        weights: by their name behind ``mm_projector.``, under our names.
        expected: names and shapes of the projector that was built by `config`; None works them out.

    Raises:
        ValueError: a setting that is not allowed.
    """
    settings = settings_of(config)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    fuser = [name for name in weights if name.startswith("fuser.")]
    kind = config.get("mm_projector_type", "linear")
    if fuser and kind != PROJECTOR_TYPE and not is_authors_config(config):
        settings = MMFuserConfig.from_llava({**config, "mm_fuser_projector": inner_projector(shapes) or "mlp2x_gelu"})
        fits = not differences(shapes, projector_shapes(config, settings))
        advice = "" if fits else _advice(config, shapes, settings)
        return (
            f"mm_projector_type={kind!r} in config.json, but the weights hold a fuser ({len(fuser)} tensors); write "
            f"mm_projector_type: {PROJECTOR_TYPE}, with the mm_fuser_* settings that it was trained with{advice}"
        )
    expected = projector_shapes(config, settings) if expected is None else expected
    if any(weight.dtype not in DTYPES.values() for name, weight in weights.items() if name not in fuser):
        # bitsandbytes stores the MLP of a quantised model in its own shapes and under more names, but never the fuser
        shapes, expected = ({n: s for n, s in of.items() if n.startswith("fuser.")} for of in (shapes, expected))
    problems = compare(shapes, expected)
    return f"weights do not fit config.json: {problems}{_advice(config, shapes, settings)}" if problems else None


def _advice(config: Mapping[str, Any], shapes: Shapes, settings: MMFuserConfig) -> str:
    """With which settings these weights would fit, as far as weights can tell; empty if with none."""
    if not any(name.startswith("fuser.") for name in shapes):
        return ""

    def expected(changes: Mapping[str, Any]) -> Shapes:
        with contextlib.suppress(ValueError):  # heads that do not divide the width
            return projector_shapes(config, dataclasses.replace(settings, **changes))
        return {}

    def changes(values: Mapping[str, Iterable[Any]]) -> Iterator[Dict[str, Any]]:
        for combination in itertools.product(*values.values()):
            change = dict(zip(values, combination))
            yield {name: value for name, value in change.items() if value != getattr(settings, name)}

    by_name = {
        "projector": [inner_projector(shapes) or settings.projector],
        "fusion": FUSIONS,
        "attention": ATTENTION_KINDS,
        "self_attention": (True, False),
    }
    named = [change for change in changes(by_name) if set(expected(change)) == set(shapes)]
    fewest = min((len(change) for change in named), default=0)
    fitting = []
    for change in (change for change in named if len(change) == fewest):
        # what only the shapes tell, one setting at a time
        others: List[Dict[str, Any]] = [{}, *({"layers": tuple(range(count))} for count in range(2, 65))]
        others += [{name: value} for name in ("num_heads", "num_points") for value in range(1, 65)]
        texts = [_spell_changes({**change, **other}) for other in others if expected({**change, **other}) == shapes]
        fitting += texts[:1] if expected(change) == shapes else texts
    return f". They fit {' or '.join(dict.fromkeys(fitting))}" if any(fitting) else ""


def _spell_changes(changes: Mapping[str, Any]) -> str:
    spelled = {name: f"{FLAG_PREFIX}{name}={value}" for name, value in changes.items()}
    if "layers" in spelled:
        spelled["layers"] = f"mm_fuser_layers of {len(changes['layers'])} layers"
    return " with ".join(spelled.values())


def check_weights(
    config: Mapping[str, Any],
    expected: Optional[Shapes],
    loaded_keys: Sequence[str],
    files: Sequence[str],
    state_dict: Optional[Mapping[str, torch.Tensor]],
) -> None:
    """Refuse a whole model's weights that do not fit its config, before they are read.

    Args:
        config: of the model that is made; it may come from another folder, as that of an adapter.
        expected: see `misfit`.
        loaded_keys: names of the weights, by the index where there is one.
        files: paths of the weight files, of which headers are read, if there is no state_dict.
        state_dict: names to tensors, or None.

    Raises:
        ValueError: see `misfit`; weights of the authors' fork; an index that names other projector weights than its
            shards have.
    """
    if state_dict is not None:
        weights = [Weight("", name, str(t.dtype)[6:], tuple(t.shape)) for name, t in state_dict.items() if MARK in name]
    else:
        weights = [weight for path in files for weight in read_weights(*os.path.split(path)) if MARK in weight.name]
    listed = {name for name in loaded_keys if MARK in name}
    differing = sorted(listed ^ {weight.name for weight in weights})
    if differing:
        raise ValueError(
            f"the index of the shards and the shards disagree about {', '.join(differing[:3])} "
            f"({len(differing)} tensors); the files belong to different checkpoints, so copy them again"
        )
    projector = projector_weights(weights)
    problem = misfit(config, projector, expected) if projector else None
    if problem:
        raise ValueError(problem)


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
    blocks, deleted, query = vision_config.num_hidden_layers, vision_config.num_deleted, Layers.parse(select_layer)
    layers = Layers.parse_listed(listed, select_layer).resolve(blocks, deleted)
    if query.name:
        same = Layers(query, setting=query.setting).resolve(blocks, deleted)[-1] == layers[-1]
    else:
        same = query.resolve(blocks, deleted) == layers
    if not same:
        raise ValueError(
            f"mm_fuser_layers={spell(listed)} and mm_vision_select_layer={query} do not end at the same layer "
            f"of mm_vision_tower={name!r}, which has {blocks} blocks; undo what was changed: the layers, the query, or "
            f"the tower. If the layers are right, write mm_vision_select_layer: {layers[-1]}"
        )
