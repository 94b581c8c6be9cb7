"""Hooks in the loading of checkpoints by LLaVA and transformers."""

import contextlib
import inspect
import logging
import os
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

from ..block.leaves import Resettable, materialize
from ..checkpoints.files import read_config, read_weights, weight_of
from ..checkpoints.folder import FULL, MIXED, Checkpoint, check_index, folder_kind, name_problem
from ..checkpoints.verdict import LOAD, judge
from ..config import PROJECTOR_TYPE, MMFuserConfig
from ..names import MARK, has_fuser
from ..projector import MMFuserProjector
from .model import report
from .resuming import ADAPTER, NON_LORA

logger = logging.getLogger("llava_mmfuser")


def initialize_weights(original, self, module, *args, **kwargs):
    """Initialize parameters without a stored value. The fuser's modules set their own."""
    if isinstance(module, Resettable) and not getattr(module, "_is_hf_initialized", False):
        own = module.parameters(recurse=False)  # transformers 5 has marked the loaded ones by now
        loaded = [(value, value.detach().clone()) for value in own if getattr(value, "_is_hf_initialized", False)]
        module.reset_parameters()
        for value, kept in loaded:
            value.detach().copy_(kept)
        module._is_hf_initialized = True  # type: ignore[assignment]  # PyTorch types attributes as tensors and modules
    else:
        original(self, module, *args, **kwargs)


def load_pretrained_weights(original, *args, **kwargs):
    given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    given.update(vars(given.pop("load_config", SimpleNamespace())))  # transformers 5 has some arguments in there
    keys = _loaded_keys(given)
    _check_weights(given, keys)
    loaded = original(*args, **kwargs)
    for projector in given["model"].modules():
        if isinstance(projector, MMFuserProjector):
            # With low_cpu_mem_usage=True and no device_map, transformers 4.37 leaves missing tensors of equal size on
            # the meta device: it thinks that they are tied.
            materialize(projector)
            settings = MMFuserConfig.from_llava(given["model"].config)
            there = {key.rpartition(MARK)[2] for key in keys}
            projector.missing = sorted(n for n, _ in projector.fuser.named_parameters() if "fuser." + n not in there)
            report(projector, settings, given["pretrained_model_name_or_path"], projector.missing)
    return loaded


def _files(given: Dict[str, Any]) -> List[str]:
    """The files that `_load_pretrained_model` reads; transformers 4.50 renamed the argument."""
    files = given.get("resolved_archive_file", given.get("checkpoint_files"))
    return [files] if isinstance(files, str) else files or []


def _loaded_keys(given: Dict[str, Any]) -> List[str]:
    """Names of the weights that `_load_pretrained_model` finds, from the index if there is one.

    Since transformers 4.50 they are not among its arguments. Then a model other than LLaVA's gives no names.
    """
    if "loaded_keys" in given:
        return given["loaded_keys"]
    if not hasattr(given["model"], "get_vision_tower"):
        return []
    if given.get("sharded_metadata") is not None:
        return given["sharded_metadata"]["all_checkpoint_keys"]
    if given["state_dict"] is not None:
        return list(given["state_dict"])
    return [weight.name for path in _files(given) for weight in read_weights(*os.path.split(path))]


def _check_weights(given: Dict[str, Any], keys: List[str]) -> None:
    """If the model or the weights have a fuser, refuse weights that do not fit, before they are read.

    Models other than LLaVA's may leave out a projector, with a fuser as without.
    """
    model, path, state = given["model"], given["pretrained_model_name_or_path"], given["state_dict"]
    config = vars(model.config)
    fused = config.get("mm_projector_type") == PROJECTOR_TYPE or has_fuser(keys)
    if not fused or not hasattr(model, "get_vision_tower"):
        return
    if state is None:
        weights = [weight for file in _files(given) for weight in read_weights(*os.path.split(file))]
    else:
        weights = [weight_of(name, value) for name, value in state.items()]
    weights = [weight for weight in weights if MARK in weight.name]
    try:
        listed = {name for name in keys if MARK in name}
        check_index(listed, weights, "the index of the shards and the shards")
        judge(Checkpoint(str(path), config, {"": weights}, shards=[""]), LOAD).check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}; `python -m llava_mmfuser inspect` shows what is there") from error


def load_pretrained_model(original, model_path, model_base, model_name, *args, **kwargs):
    _check_checkpoint(model_path, model_base, model_name)
    return original(model_path, model_base, model_name, *args, **kwargs)


def _check_checkpoint(model_path: str, model_base: Optional[str], model_name: str) -> None:
    """Refuse what `load_pretrained_model` would load wrong without an error.

    That is the authors' format, an adapter that does not fit, and a fuser that these arguments or this name make it
    skip.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Optional[str]:
        with contextlib.suppress(OSError):  # upstream's loading names the missing file
            return cached_file(model_path, name)
        return None

    file = find("config.json")
    config = (read_config(os.path.dirname(file)) if file else None) or {}
    is_lora, fused = "lora" in model_name.lower(), config.get("mm_projector_type") == PROJECTOR_TYPE
    if fused:
        _check_place(model_path, model_base, model_name, config)
    used = bool(config) and model_base is not None and "llava" in model_name.lower()
    adapter = find(NON_LORA if is_lora else ADAPTER) if used else None
    if adapter is None:
        return
    folder, file = os.path.split(adapter)
    weights = []
    with contextlib.nullcontext() if fused else contextlib.suppress(ValueError):  # LLaVA's own read is no concern here
        weights = read_weights(folder, file)
    if fused or has_fuser(weight.name for weight in weights):
        judge(Checkpoint(folder, config, {file: weights}, adapters=[file]), LOAD).check()


def _check_place(path: str, base: Optional[str], name: str, config: Dict[str, Any]) -> None:
    """Refuse a checkpoint with a fuser if LLaVA would take it for another kind of folder."""
    kind = folder_kind(path) if os.path.isdir(path) else None
    if kind is not None and kind != FULL and base is None:
        other = ", or move adapter_config.json away to load the full checkpoint beside it" if kind == MIXED else ""
        advice = "pass model_base, the model it was trained on"
        raise ValueError(f"{path} is {kind}, without model_base its fuser is not read; {advice}{other}")
    if kind == FULL and base is not None and not os.path.isfile(os.path.join(path, ADAPTER)):
        raise ValueError(f"{path} is {kind}, but model_base={base!r} was given; pass model_base=None")
    problem = name_problem(name, kind or FULL, config)
    if problem is not None and (base is not None or "mpt" in name.lower()):
        raise ValueError(f"{path}: {problem}, else its fuser is not read")
    if problem is not None:
        logger.warning("%s: %s, else LLaVA loads no vision tower and returns no image_processor", path, problem)
