"""Weight files, whose headers tell names, dtypes and shapes, and config.json. A ``.bin`` is memory-mapped."""

import contextlib
import functools
import inspect
import json
import math
import os
import zipfile
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import torch

from ..names import MARK, without_wrapper

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_MAPPED = 256 << 20  # bytes of a ``.bin`` that may be in memory at once


class Weight(NamedTuple):
    """A tensor of a file: the file in its folder, full name, dtype, shape, and what reads or makes it when asked."""

    file: str
    name: str
    dtype: str
    shape: Tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()


def weight_of(name: str, tensor: torch.Tensor) -> Weight:
    """A tensor that is in memory."""
    return Weight("", name, str(tensor.dtype)[6:], tuple(tensor.shape), lambda: tensor)


def read_weights(folder: str, file: str) -> List[Weight]:
    """Names, dtypes and shapes of the tensors in a safetensors or ``.bin`` file, in its order."""
    path = os.path.join(folder, file)
    if not file.endswith(".safetensors"):
        read = _Bin(path).read
        found = {name: weight_of(name, tensor) for name, tensor in load_bin(path).items()}
        return [w._replace(file=file, read=functools.partial(read, name)) for name, w in found.items()]
    entries = [(name, e["dtype"], e["shape"]) for name, e in read_header(path)[0].items() if name != "__metadata__"]
    read = functools.partial(_read_safetensors, path)
    return [Weight(file, n, DTYPES.get(d, d), tuple(shape), functools.partial(read, n)) for n, d, shape in entries]


def _read_safetensors(path: str, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:  # opened for one tensor: what stays mapped counts as memory
        return stream.get_tensor(name)


class _Bin:
    """Reads the tensors of a mapped file, which is mapped again before too much of it is in memory."""

    def __init__(self, path: str):
        self.path, self.left = path, 0
        self.state: Dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        if self.left <= 0:
            self.state, self.left = load_bin(self.path), _MAPPED
        self.left -= self.state[name].nbytes
        return self.state[name]


def float_weights(folder: str, files: Iterable[str]) -> Dict[str, Weight]:
    """The weights of a model's files by their names, files in order; the last of two counts."""
    found = {}
    for weight in (weight for file in files for weight in read_weights(folder, file)):
        if weight.name.endswith(("rotary_emb.inv_freq", "position_ids")):  # buffers that old versions saved
            continue
        if weight.dtype not in DTYPES.values():
            where = os.path.join(folder, weight.file)
            raise ValueError(f"{where}: {weight.name} is {weight.dtype}; only weights in floating point are allowed")
        found[weight.name] = weight
    return found


def read_header(path: str) -> Tuple[Dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data begin, in bytes; refuses a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"), open(path, "rb") as stream:  # the former checks header and length
            length = int.from_bytes(stream.read(8), "little")
            return json.loads(stream.read(length).decode("utf-8")), 8 + length
    except (SafetensorError, ValueError) as error:
        what = f"{path} ({os.path.getsize(path)} bytes) is not a complete safetensors file, it is truncated or damaged"
        raise ValueError(f"{what}: {error}; download or copy it again") from error


def load_bin(path: str) -> Dict[str, torch.Tensor]:
    """As `read_tensors`, memory-mapped where the file and torch can."""
    return read_tensors(path, mmap=zipfile.is_zipfile(path) and "mmap" in inspect.signature(torch.load).parameters)


def read_tensors(path: str, **options: Any) -> Dict[str, torch.Tensor]:
    """Read a state dict saved by `torch.save` onto the CPU, with ``weights_only=True``, which runs no code in the file.

    Before torch 2.6 that has a known hole (CVE-2025-32434): take safetensors of strangers, or a newer torch.
    """
    if not os.path.isfile(path):
        hint = "a folder; name the file in it, such as mm_projector.bin" if os.path.isdir(path) else "no such file"
        raise ValueError(f"{path}: {hint}")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # of no common type; its text is left out, because torch advises to run the file's code
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) cannot be read as tensors saved by torch.save "
            f"({type(error).__name__}). It is truncated, of another format, or holds other Python objects, "
            f"which are not loaded because they could run code; download or save it again"
        ) from error
    kind = type(state_dict).__name__
    if isinstance(state_dict, dict):
        if all(isinstance(value, torch.Tensor) for value in state_dict.values()):
            same = all(isinstance(name, str) for name in state_dict)
            return state_dict if same else {str(name): value for name, value in state_dict.items()}
        kind = "dict of " + ", ".join(sorted({type(value).__name__ for value in state_dict.values()}))
    raise ValueError(f"{path} holds a {kind}, not a state dict (names to tensors)")


def save_tensors(state_dict: Mapping[str, torch.Tensor], path: str) -> None:
    """Save a state dict by `torch.save`, beside `path` first, so that `path` is never a half-written file."""
    partial = path + ".partial"
    try:
        torch.save(dict(state_dict), partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def read_json(path: str) -> Any:
    """What a JSON file holds; raises ValueError for what transformers could not read."""
    with open(path, encoding="utf-8") as stream:
        try:
            return json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error


def read_config(folder: str) -> Optional[Dict[str, Any]]:
    """``config.json`` of a folder as a dict, or None where there is none; raises ValueError for what is no object."""
    file = os.path.join(folder, "config.json")
    if not os.path.isfile(file):
        return None
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object; copy the config.json that was saved with the weights")
    return config


def refuse_nan(weights: Iterable[Weight]) -> None:
    """Raise ValueError if one holds NaN or Inf."""
    for weight in weights:
        if not torch.isfinite(weight.read()).all():
            advice = "its training diverged, or the file is damaged: take an earlier checkpoint"
            raise ValueError(f"{weight.file}: {weight.name} holds NaN or Inf; {advice}")


def projector_weights(weights: Iterable[Weight]) -> Dict[str, Weight]:
    """Those of a projector, by their name behind ``mm_projector.``."""
    projector = {weight.name.split(MARK, 1)[1]: weight for weight in weights if MARK in weight.name}
    without_wrapper(projector)
    return projector
