"""Does a checkpoint fit? One answer for `inspect`, loading, `convert`, `upgrade`, `export` and pictures.

Every reason to say no is a line in `QUESTIONS`. Only the headers of weight files are read, but for one question.
"""

import enum
from typing import Any, Callable, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch

from ..block.kinds import FUSIONS, MAX_WIDTH, check_count
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig, read_setting
from ..layers import Layers, spell
from ..names import (
    MARK,
    Format,
    Shapes,
    convert_hint,
    differences,
    expected_shapes,
    has_fuser,
    is_authors_config,
    is_fused,
    native_hint,
    to_published,
)
from ..towers import TowerConfig, check_features, check_tower_is_there
from .files import DTYPES, Weight, read_header, read_tensors_of
from .folder import MIXED, MODEL, NON_LORA, Checkpoint, folder_kind, name_from_path, name_problem

AUTHORS_SETTINGS = MMFuserConfig(layers=Layers((-22, -17, -12, -7, -2)))  # their code fixes all but these numbers
NAME_NOTE = "LLaVA goes by the name"


class Purpose(enum.Enum):
    """Who asks."""

    INSPECT = "inspect"
    LOAD = "load"
    ADAPTER = "inspect an adapter"  # as for --pretrain_mm_mlp_adapter, which translates the authors' names
    CONVERT = "convert"
    TO_AUTHORS = "convert --to authors"
    UPGRADE = "upgrade"
    EXPORT = "export"
    DRAW = "visualize"


INSPECT, LOAD, ADAPTER, CONVERT, TO_AUTHORS, UPGRADE, EXPORT, DRAW = EVERY = tuple(Purpose)
WRITING = (CONVERT, TO_AUTHORS, UPGRADE, EXPORT)
FORMATS: Dict[Purpose, Tuple[Format, ...]] = {
    **dict.fromkeys((INSPECT, LOAD), (Format.OURS, Format.LLAVA)),
    **dict.fromkeys((ADAPTER, DRAW), (Format.OURS, Format.LLAVA, Format.AUTHORS)),
    **dict.fromkeys((TO_AUTHORS, EXPORT), (Format.OURS,)),
    CONVERT: (Format.AUTHORS,),
    UPGRADE: (Format.LLAVA,),
}


class Verdict(NamedTuple):
    """What is known of a checkpoint after all questions."""

    format: Format
    settings: MMFuserConfig  # with layers as they are written; of plain LLaVA the defaults
    problems: List[str]  # why it does not serve the purpose
    notes: List[str]  # what the user should know

    def check(self) -> MMFuserConfig:
        """The settings; raises ValueError with the first problem, if there is one."""
        if self.problems:
            raise ValueError(self.problems[0])
        return self.settings


class Case(NamedTuple):
    """What a question is asked about."""

    checkpoint: Checkpoint
    purpose: Purpose
    tower: Optional[TowerConfig]
    config: Mapping[str, Any]
    settings: MMFuserConfig
    projectors: Mapping[str, Mapping[str, Weight]]


def judge(checkpoint: Checkpoint, purpose: Purpose, tower: Optional[TowerConfig] = None) -> Verdict:
    """Ask all questions of a purpose.

    Args:
        checkpoint: as `read_checkpoint` returns it, or made of what is known.
        purpose: who asks.
        tower: the checkpoint's vision tower; None where it is unknown, so that layers are not compared with it.
    """
    format, config = checkpoint.format(), checkpoint.config
    problems: List[str] = []
    notes: List[str] = []
    try:
        if format not in FORMATS[purpose]:
            check_format(checkpoint, FORMATS[purpose][0], purpose.value)
        settings = settings_of(config) if is_fused(config) else MMFuserConfig()
    except ValueError as error:  # nothing else can be asked
        return Verdict(format, MMFuserConfig(), [str(error)], notes)
    case = Case(checkpoint, purpose, tower, config, settings, checkpoint.projectors())
    for question in QUESTIONS:
        found = problems if purpose in question.refused_by else notes if purpose in question.noted_by else None
        if found is not None:
            try:
                question.ask(case)
            except ValueError as error:
                found.append(str(error))
    return Verdict(format, settings, problems, notes)


def check_format(checkpoint: Checkpoint, wanted: Format, command: str) -> None:
    """Refuse a checkpoint of another format, with the command to use instead."""
    folder, found = checkpoint.folder, checkpoint.format()
    if found is wanted:
        return
    config = checkpoint.config
    back = f" (python -m llava_mmfuser convert --to authors {folder} OUT writes the authors')"
    messages = {
        Format.OURS: "in the format of llava_mmfuser already, with a fuser; nothing is to be done"
        + (back if command == "convert" else ""),
        Format.AUTHORS: "in the authors' format already; nothing is to be done"
        if command == TO_AUTHORS.value
        else convert_hint(folder),
        Format.LLAVA: f"plain LLaVA (mm_projector_type={config.get('mm_projector_type', 'linear')!r}) without a fuser; "
        f"put a fresh one in front with: python -m llava_mmfuser upgrade {folder} OUT",
        Format.NATIVE: native_hint(folder),
        Format.OTHER: f"not a LLaVA checkpoint: its config.json has model_type={config.get('model_type')!r} and "
        f"neither mm_vision_tower nor mm_projector_type",
    }
    raise ValueError(f"{folder} is {messages[found]}")


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


def other_setting(before: MMFuserConfig, now: MMFuserConfig) -> Optional[Tuple[str, str, str]]:
    """The flag of the first setting that has another value now, and both values as one writes them, or None."""
    name = now.difference(before)
    return None if name is None else (FLAG_PREFIX + name, spell(getattr(before, name)), spell(getattr(now, name)))


def misfit(config: Mapping[str, Any], weights: Mapping[str, Weight], theirs: bool = False) -> Optional[str]:
    """Why a projector's weights do not fit a config.json of any format; None if they do.

    Args:
        config: its widths and settings count.
        weights: by their name behind ``mm_projector.``.
        theirs: whether the names are the authors'. Without any weight of a fuser, only others of ours count.

    Raises:
        ValueError: a setting that is not allowed; a width that is absent, or that the heads do not divide.
    """
    fused = has_fuser(weights)
    if fused and not is_fused(config):
        return (
            f"mm_projector_type={config.get('mm_projector_type', 'linear')!r} in config.json, but the weights hold a "
            f"fuser; write mm_projector_type: {PROJECTOR_TYPE}, with the mm_fuser_* settings that it was trained with"
        )
    _check_widths(config)
    expected = expected_shapes(settings_of(config), config["mm_hidden_size"], config["hidden_size"])
    found: Shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    others = [weight.dtype for name, weight in weights.items() if not name.startswith("fuser.")]
    if not theirs and not set(others) <= set(DTYPES.values()):
        # bitsandbytes stores the MLP of a quantised model in its own shapes and under more names, but never the fuser
        found, expected = ({n: s for n, s in of.items() if n.startswith("fuser.")} for of in (found, expected))
    if theirs:
        expected = {to_published(name): shape for name, shape in expected.items()}
    elif not fused:
        expected = {name: shape for name, shape in expected.items() if not name.startswith("fuser.")}
    problems = differences(found, expected)
    advice = "undo what was changed in config.json, or copy the weights that were saved with it"
    return f"weights do not fit config.json: {problems}; {advice}" if problems else None


def _check_widths(config: Mapping[str, Any]) -> None:
    for name in ("mm_hidden_size", "hidden_size"):
        check_count(config.get(name), MAX_WIDTH, f"config.json: {name}")


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


def _folder_is_one_thing(case: Case) -> None:
    if folder_kind(case.checkpoint.folder) == MIXED:
        raise ValueError(
            "it holds a full checkpoint and an adapter_config.json, of which transformers takes the latter, and leaves "
            "out the projector; move one of them away"
        )


def _transformers_reads_the_files(case: Case) -> None:
    for file in case.checkpoint.shards:
        if file.endswith(".safetensors"):
            metadata = read_header(case.checkpoint.path(file))[0].get("__metadata__") or {}
            if metadata.get("format") not in ("pt", "tf", "flax"):
                raise ValueError(f"{file} has no 'format' in its metadata, which transformers asks for; save it again")


def _authors_code_can(case: Case) -> None:
    settings, where = case.settings, f"{case.checkpoint.folder}/config.json"
    if case.purpose is CONVERT and not is_authors_config(case.config):
        raise ValueError(
            f"mm_vision_select_layer={case.config.get('mm_vision_select_layer')!r} in {where}, but the weights are "
            f"those of the authors' fork; write the five layers it was trained with there, such as "
            f"[{spell(AUTHORS_SETTINGS.layers)}]"
        )
    if settings.layers.name or settings.num_layers != AUTHORS_SETTINGS.num_layers:
        raise ValueError(
            f"{settings.layers.setting}={settings.layers} in {where}, but the authors' code fuses exactly five listed "
            f"layers"
        )
    for name in ("fusion", "attention", "self_attention", "num_heads", "num_points"):
        value, allowed = getattr(settings, name), getattr(AUTHORS_SETTINGS, name)
        if value != allowed:
            raise ValueError(
                f"mm_fuser_{name}={value!r} in {where} cannot be expressed in the authors' format; their code has "
                f"{allowed!r} only"
            )


def _features_can_be_read(case: Case) -> None:
    if is_fused(case.config) or case.purpose is DRAW:
        check_features(case.config, case.tower.kind if case.tower else None)


def _tower_is_named(case: Case) -> None:
    if case.config.get("mm_vision_tower") is None and (case.purpose is not LOAD or _holds_fuser(case)):
        raise ValueError("config.json has no mm_vision_tower; write there which vision tower it was trained with")


def _tower_has_the_layers(case: Case) -> None:
    if is_fused(case.config):
        _check_widths(case.config)
        if case.tower is not None:
            case.settings.resolve(case.tower)
            check_tower(case.config, case.tower)
        elif case.settings.layers.name is None:
            case.settings.layers.check_order()


def _tower_is_known(case: Case) -> None:
    if is_fused(case.config) and case.tower is None:
        name = case.config.get("mm_vision_tower")
        raise ValueError(f"layers not compared with the vision tower, because {name!r} is not on this machine")


def _projector_is_there(case: Case) -> None:
    checkpoint = case.checkpoint
    frozen = checkpoint.adapters == [NON_LORA] and case.purpose in (INSPECT, LOAD, EXPORT)  # then the base has it
    elsewhere = frozen or bool(checkpoint.shards) and case.purpose is LOAD or case.purpose is DRAW
    if not case.projectors and not elsewhere:
        files = ", ".join(checkpoint.shards + checkpoint.adapters)
        raise ValueError(f"{checkpoint.folder} has no weights of a projector: no name with {MARK!r} in {files}")
    if checkpoint.shards and MODEL not in case.projectors and not elsewhere:
        has_one = " and ".join(case.projectors)
        raise ValueError(f"{checkpoint.folder}: {MODEL} has no projector, though {has_one} has one")


def _weights_fit(case: Case) -> None:
    of_authors = case.checkpoint.format() is Format.AUTHORS
    for label, weights in case.projectors.items():
        problem = misfit(case.config, weights, theirs=of_authors)
        if problem:
            raise ValueError(problem if label == MODEL else f"{case.checkpoint.path(label)}: {problem}")


def _fuser_is_there(case: Case) -> None:
    if is_fused(case.config) and FUSIONS[case.settings.fusion].has_weights:
        for label, weights in case.projectors.items():
            if not has_fuser(weights):
                raise ValueError(
                    f"{label} has no weights of its fuser, which starts as the identity; train it, or name the folder "
                    f"that it was trained in"
                )


def _numbers_are_finite(case: Case) -> None:
    for weights in case.projectors.values():
        numbers = {name: weight for name, weight in weights.items() if weight.dtype in DTYPES.values()}
        for name, value in read_tensors_of(case.checkpoint.folder, numbers):
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{weights[name].file}: {weights[name].name} holds NaN or Inf; a training that diverged saved it, "
                    f"or the file is damaged: take an earlier checkpoint"
                )


def _tower_is_where_llava_looks(case: Case) -> None:
    check_tower_is_there(case.config)


def _name_is_right(case: Case) -> None:
    folder = case.checkpoint.folder
    problem = name_problem(name_from_path(folder), folder_kind(folder), case.config)
    if problem:
        raise ValueError(f"{NAME_NOTE}, and {problem}")


def _holds_fuser(case: Case) -> bool:
    return any(map(has_fuser, case.projectors.values()))


class Question(NamedTuple):
    """Raises ValueError with its answer, unless that is yes."""

    ask: Callable[[Case], None]
    refused_by: Collection[Purpose]  # purposes for which the answer is a problem
    noted_by: Collection[Purpose] = ()  # and for which it is a note


# fmt: off
QUESTIONS = (  # in the order in which they are asked
    Question(_folder_is_one_thing, (INSPECT,)),
    Question(_transformers_reads_the_files, (INSPECT,)),
    Question(_authors_code_can, (CONVERT, TO_AUTHORS)),
    Question(_features_can_be_read, (INSPECT, ADAPTER, EXPORT, DRAW)),
    Question(_tower_is_named, (INSPECT, LOAD, EXPORT)),
    Question(_projector_is_there, EVERY),
    Question(_tower_has_the_layers, EVERY),
    Question(_tower_is_known, (), (INSPECT, ADAPTER)),
    Question(_weights_fit, EVERY),
    Question(_fuser_is_there, (TO_AUTHORS, EXPORT), (INSPECT, ADAPTER)),
    Question(_numbers_are_finite, WRITING, (INSPECT, ADAPTER)),
    Question(_tower_is_where_llava_looks, (INSPECT,)),
    Question(_name_is_right, (), (INSPECT,)),
)
# fmt: on
