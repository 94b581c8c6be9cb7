"""Does a checkpoint fit? One answer for `inspect`, loading, `convert`, `upgrade`, `export` and pictures.

Every reason to say no is a row of `QUESTIONS`. Of weight files only headers are read, but for one question.
"""

import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from ..block.kinds import FUSIONS, MAX_WIDTH, check_count
from ..config import FLAG_PREFIX, PROJECTOR_TYPE, MMFuserConfig, read_setting
from ..layers import Layers, spell
from ..names import (
    MARK,
    Format,
    compare,
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
from .files import DTYPES, Weight, read_header, read_tensors_of, refuse_nan
from .folder import MIXED, MODEL, NON_LORA, Checkpoint, folder_kind, name_from_path, name_problem

# Who asks. ADAPTER is `inspect` of a file for --pretrain_mm_mlp_adapter, which translates the authors' names.
INSPECT, ADAPTER, LOAD, DRAW = "inspect", "inspect of a file", "load", "visualize"
CONVERT, TO_AUTHORS, UPGRADE, EXPORT = WRITING = ("convert", "convert --to authors", "upgrade", "export")
EVERY = (INSPECT, ADAPTER, LOAD, DRAW, *WRITING)
FORMATS: Dict[str, Tuple[Format, ...]] = {  # that serve a purpose
    **dict.fromkeys((INSPECT, LOAD), (Format.OURS, Format.LLAVA)),
    **dict.fromkeys((ADAPTER, DRAW), (Format.OURS, Format.LLAVA, Format.AUTHORS)),
    **{TO_AUTHORS: (Format.OURS,), EXPORT: (Format.OURS,), CONVERT: (Format.AUTHORS,), UPGRADE: (Format.LLAVA,)},
}
AUTHORS_SETTINGS = MMFuserConfig(layers=Layers((-22, -17, -12, -7, -2)))  # their code fixes all but these numbers


@dataclasses.dataclass
class Verdict:
    """What is asked about, and what came out."""

    checkpoint: Checkpoint
    purpose: str  # one of `EVERY`
    tower: Optional[TowerConfig]  # the checkpoint's; None where it is unknown, so that layers are not compared with it
    format: Format
    problem: Optional[str] = None  # why the checkpoint does not serve the purpose
    notes: List[str] = dataclasses.field(default_factory=list)  # what the user should know

    @property
    def settings(self) -> MMFuserConfig:
        """The fuser's, with layers as they are written; of plain LLaVA the defaults."""
        return settings_of(self.checkpoint.config) if is_fused(self.checkpoint.config) else MMFuserConfig()

    def check(self) -> MMFuserConfig:
        """The settings; raises ValueError with the problem, if there is one."""
        if self.problem is not None:
            raise ValueError(self.problem)
        return self.settings


def judge(checkpoint: Checkpoint, purpose: str, tower: Optional[TowerConfig] = None) -> Verdict:
    """Ask the questions of a purpose until one is answered by no; see `Verdict` for the arguments."""
    verdict = Verdict(checkpoint, purpose, tower, checkpoint.format())
    for ask, refused, noted in QUESTIONS:
        if purpose in refused + noted:
            try:
                ask(verdict)
            except ValueError as error:
                if purpose in refused:
                    verdict.problem = str(error)
                    break
                verdict.notes.append(str(error))
    return verdict


def check_format(checkpoint: Checkpoint, wanted: Format, command: str) -> None:
    """Refuse a checkpoint of another format, with the command to use instead."""
    folder, kind = checkpoint.folder, checkpoint.config.get("mm_projector_type", "linear")
    known = "in the authors' format already; nothing is to be done" if command == TO_AUTHORS else convert_hint(folder)
    is_what = {
        Format.OURS: "in the format of llava_mmfuser already, with a fuser; nothing is to be done (the authors' is "
        f"written by: python -m llava_mmfuser convert --to authors {folder} OUT)",
        Format.AUTHORS: known,
        Format.LLAVA: f"plain LLaVA (mm_projector_type={kind!r}) without a fuser; put a fresh one in front with: "
        f"python -m llava_mmfuser upgrade {folder} OUT",
        Format.NATIVE: native_hint(folder),
        Format.OTHER: f"not a LLaVA checkpoint: its config.json has model_type={checkpoint.config.get('model_type')!r} "
        f"and neither mm_vision_tower nor mm_projector_type",
    }
    if checkpoint.format() is not wanted:
        raise ValueError(f"{folder} is {is_what[checkpoint.format()]}")


def settings_of(config: Mapping[str, Any]) -> MMFuserConfig:
    """The fuser's settings in a config.json of any format; of plain LLaVA only the projector means something."""
    if config.get("mm_projector_type") == PROJECTOR_TYPE:
        return MMFuserConfig.from_llava(config)
    settings = MMFuserConfig(projector=config.get("mm_projector_type", "linear"))
    listed = config.get("mm_vision_select_layer")
    return dataclasses.replace(settings, layers=Layers.parse(listed)) if is_authors_config(config) else settings


def other_setting(before: MMFuserConfig, now: MMFuserConfig) -> Optional[Tuple[str, str, str]]:
    """The flag of the first setting that has another value now, and both values as one writes them, or None."""
    name = now.difference(before)
    return None if name is None else (FLAG_PREFIX + name, spell(getattr(before, name)), spell(getattr(now, name)))


def misfit(config: Mapping[str, Any], weights: Mapping[str, Weight], theirs: bool = False) -> Optional[str]:
    """Why a projector's weights do not fit a config.json of any format; None if they do.

    Weights go by their name behind ``mm_projector.``, ours or `theirs`; without any of our fuser only the others count.

    Raises:
        ValueError: a setting that is not allowed; a width that is absent, or that the heads do not divide.
    """
    kind = config.get("mm_projector_type", "linear")
    if has_fuser(weights) and not is_fused(config):
        return (
            f"mm_projector_type={kind!r} in config.json, but the weights hold a fuser; write mm_projector_type: "
            f"{PROJECTOR_TYPE}, with the mm_fuser_* settings that it was trained with"
        )
    _check_widths(config)
    expected = expected_shapes(settings_of(config), config["mm_hidden_size"], config["hidden_size"])
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if theirs:
        problems = differences(found, {to_published(name): shape for name, shape in expected.items()})
    else:
        if not {w.dtype for name, w in weights.items() if not name.startswith("fuser.")} <= set(DTYPES.values()):
            # bitsandbytes stores the MLP of a quantised model in its own shapes and under more names, never the fuser
            found, expected = ({n: s for n, s in of.items() if n.startswith("fuser.")} for of in (found, expected))
        problems = compare(found, expected)
    advice = "undo what was changed in config.json, or copy the weights that were saved with it"
    return f"weights do not fit config.json: {problems}; {advice}" if problems else None


def _check_widths(config: Mapping[str, Any]) -> None:
    for name in ("mm_hidden_size", "hidden_size"):
        check_count(config.get(name), MAX_WIDTH, f"config.json: {name}")


def check_tower(config: Any, vision_config: Any) -> None:
    """Refuse a config.json (dict or object) of a LLaVA with fuser whose vision tower is not the one it describes.

    That is: another width; no ``mm_vision_select_layer``, or another layer of this tower than the last of
    ``mm_fuser_layers``, as after exchanging the tower or editing one of the two.
    """
    width, name = read_setting(config, "mm_hidden_size"), read_setting(config, "mm_vision_tower")
    if width is not None and width != vision_config.hidden_size:
        raise ValueError(
            f"mm_hidden_size={width!r}, but mm_vision_tower={name!r} has width {vision_config.hidden_size}; name the "
            f"vision tower that the checkpoint was trained with"
        )
    listed, select_layer = read_setting(config, "mm_fuser_layers"), read_setting(config, "mm_vision_select_layer")
    if select_layer is None:
        raise ValueError("config.json has no mm_vision_select_layer, which LLaVA asks for; write the query layer there")
    if listed is None:
        return
    blocks, deleted, query = vision_config.num_hidden_layers, vision_config.num_deleted, Layers.parse(select_layer)
    layers = Layers.parse_listed(listed, select_layer).resolve(blocks, deleted)
    selected = Layers(query, setting=query.setting).resolve(blocks, deleted)
    if selected != (layers[-1:] if query.name else layers):
        raise ValueError(
            f"mm_fuser_layers={spell(listed)} and mm_vision_select_layer={query} do not end at the same layer "
            f"of mm_vision_tower={name!r}, which has {blocks} blocks; undo what was changed: the layers, the query, or "
            f"the tower. If the layers are right, write mm_vision_select_layer: {layers[-1]}"
        )


def _format_serves(of: Verdict) -> None:
    if of.format not in FORMATS[of.purpose]:
        check_format(of.checkpoint, FORMATS[of.purpose][0], of.purpose)


def _transformers_reads_it(of: Verdict) -> None:
    if folder_kind(of.checkpoint.folder) == MIXED:
        found = "it holds a full checkpoint and an adapter_config.json, of which transformers takes the latter"
        raise ValueError(f"{found}, and leaves out the projector; move one of them away")
    for file in (file for file in of.checkpoint.shards if file.endswith(".safetensors")):
        metadata = read_header(of.checkpoint.path(file))[0].get("__metadata__") or {}
        if metadata.get("format") not in ("pt", "tf", "flax"):
            raise ValueError(f"{file} has no 'format' in its metadata, which transformers asks for; save it again")


def _authors_code_can(of: Verdict) -> None:
    settings, file = of.settings, of.checkpoint.path("config.json")
    query, listed = of.checkpoint.config.get("mm_vision_select_layer"), spell(AUTHORS_SETTINGS.layers)
    if of.purpose == CONVERT and not is_authors_config(of.checkpoint.config):
        advice = f"write the five layers that it was trained with there, such as [{listed}]"
        raise ValueError(f"mm_vision_select_layer={query!r} in {file}, but the weights are the authors'; {advice}")
    if settings.layers.name or settings.num_layers != AUTHORS_SETTINGS.num_layers:
        found = f"{settings.layers.setting}={settings.layers} in {file}"
        raise ValueError(f"{found}, but the authors' code fuses exactly five listed layers")
    own = {name: getattr(settings, name) for name in ("layers", "projector", "start")}  # of the weights no matter
    theirs = dataclasses.replace(AUTHORS_SETTINGS, **own)
    other = other_setting(settings, theirs)
    if other is not None:
        found = f"{other[0]}={other[1]} in {file} cannot be expressed in the authors' format"
        raise ValueError(f"{found}; their code has {other[2]} only")


def _features_can_be_read(of: Verdict) -> None:
    if is_fused(of.checkpoint.config) or of.purpose == DRAW:
        check_features(of.checkpoint.config, of.tower.kind if of.tower else None)


def _tower_is_named(of: Verdict) -> None:
    holds_fuser = any(map(has_fuser, of.checkpoint.projectors().values()))
    if of.checkpoint.config.get("mm_vision_tower") is None and (of.purpose != LOAD or holds_fuser):
        raise ValueError("config.json has no mm_vision_tower; write there which vision tower it was trained with")


def _projector_is_there(of: Verdict) -> None:
    checkpoint, there = of.checkpoint, list(of.checkpoint.projectors())
    frozen = checkpoint.adapters == [NON_LORA] and of.purpose in (INSPECT, LOAD, EXPORT)  # then the base has it
    if (checkpoint.shards and of.purpose == LOAD) or (not checkpoint.shards and frozen):
        return
    if not there or (checkpoint.shards and MODEL not in there):
        others = f", though {' and '.join(there)} has one" if there else ""
        files = ", ".join(checkpoint.shards or checkpoint.adapters)
        raise ValueError(f"{checkpoint.folder} has no weights of a projector: no name with {MARK!r} in {files}{others}")


def _tower_has_the_layers(of: Verdict) -> None:
    if is_fused(of.checkpoint.config):
        _check_widths(of.checkpoint.config)
        if of.tower is not None:
            of.settings.resolve(of.tower)
            check_tower(of.checkpoint.config, of.tower)
        elif of.settings.layers.name is None:
            of.settings.layers.check_order()


def _tower_is_known(of: Verdict) -> None:
    if is_fused(of.checkpoint.config) and of.tower is None:
        name = of.checkpoint.config.get("mm_vision_tower")
        raise ValueError(f"layers not compared with the vision tower, because {name!r} is not on this machine")


def _weights_fit(of: Verdict) -> None:
    for label, weights in of.checkpoint.projectors().items():
        problem = misfit(of.checkpoint.config, weights, theirs=of.format is Format.AUTHORS)
        if problem:
            raise ValueError(problem if label == MODEL else f"{of.checkpoint.path(label)}: {problem}")


def _fuser_is_there(of: Verdict) -> None:
    without = [label for label, weights in of.checkpoint.projectors().items() if not has_fuser(weights)]
    if without and is_fused(of.checkpoint.config) and FUSIONS[of.settings.fusion].has_weights:
        advice = "train it, or name the folder that it was trained in"
        raise ValueError(f"{without[0]} has no weights of its fuser, which starts as the identity; {advice}")


def _numbers_are_finite(of: Verdict) -> None:
    for weights in of.checkpoint.projectors().values():
        numbers = {name: weight for name, weight in weights.items() if weight.dtype in DTYPES.values()}
        for name, value in read_tensors_of(of.checkpoint.folder, numbers):
            refuse_nan(numbers[name].file, numbers[name].name, value)


def _name_is_right(of: Verdict) -> None:
    folder = of.checkpoint.folder
    problem = name_problem(name_from_path(folder), folder_kind(folder), of.checkpoint.config)
    if problem:
        raise ValueError(f"LLaVA goes by the name, and {problem}")


# fmt: off
# What is asked, in this order: a function that raises ValueError unless the answer is yes; the purposes for which its
# text is the problem; and those for which it is a note.
QUESTIONS: Tuple[Tuple[Callable[[Verdict], Any], Tuple[str, ...], Tuple[str, ...]], ...] = (
    (_format_serves, EVERY, ()),
    (lambda of: of.settings, EVERY, ()),  # they are allowed
    (_transformers_reads_it, (INSPECT,), ()),
    (_authors_code_can, (CONVERT, TO_AUTHORS), ()),
    (_features_can_be_read, (INSPECT, ADAPTER, EXPORT, DRAW), ()),
    (_tower_is_named, (INSPECT, LOAD, EXPORT), ()),
    (_projector_is_there, (INSPECT, ADAPTER, LOAD, *WRITING), ()),
    (_tower_has_the_layers, EVERY, ()),
    (_tower_is_known, (), (INSPECT, ADAPTER)),
    (_weights_fit, EVERY, ()),
    (_fuser_is_there, (TO_AUTHORS, EXPORT), (INSPECT, ADAPTER)),
    (_numbers_are_finite, (CONVERT, TO_AUTHORS, UPGRADE), (INSPECT, ADAPTER)),  # export asks of what it has merged
    (lambda of: check_tower_is_there(of.checkpoint.config), (INSPECT,), ()),
    (_name_is_right, (), (INSPECT,)),
)
# fmt: on
