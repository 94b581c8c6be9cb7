"""Weight files, whose headers tell names, dtypes and shapes, and config.json. A ``.bin`` is memory-mapped."""

import contextlib
import json
import os
import zipfile
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import torch

from ..names import MARK, without_wrapper

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class Weight(NamedTuple):
    """Where one tensor lies (file in the checkpoint's folder, full name), with its dtype and shape."""

    file: str
    name: str
    dtype: str
    shape: Tuple[int, ...]


def read_weights(folder: str, file: str) -> List[Weight]:
    """Names, dtypes and shapes of the tensors in a safetensors or ``.bin`` file, in its order.

    Raises:
        ValueError: see `read_header` and `load_bin`.
    """
    path = os.path.join(folder, file)
    if file.endswith(".safetensors"):
        entries = [(name, entry) for name, entry in read_header(path)[0].items() if name != "__metadata__"]
        return [Weight(file, name, DTYPES.get(e["dtype"], e["dtype"]), tuple(e["shape"])) for name, e in entries]
    state = load_bin(path)
    return [Weight(file, name, str(t.dtype).replace("torch.", ""), tuple(t.shape)) for name, t in state.items()]


def read_header(path: str) -> Tuple[Dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data begin, in bytes.

    Raises:
        ValueError: not a safetensors file, or one whose length is not what its header says.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if size < 8 or length > size - 8:
                raise ValueError(f"its header would take {length} bytes")
            header = json.loads(stream.read(length).decode("utf-8"))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max([entry["data_offsets"][1] for entry in entries], default=0)
            if not all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in entries):
                raise ValueError("its header has other entries than tensors")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{path} ({size} bytes) is not a complete safetensors file: {error}; download or copy it again"
            ) from error
    if end != size:
        raise ValueError(
            f"{path} has {size} bytes, but its header says {end}: it is truncated or damaged; download or copy it again"
        )
    return header, 8 + length


def load_bin(path: str) -> Dict[str, torch.Tensor]:
    """As `read_tensors`, memory-mapped where the file's format allows."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(Exception):  # `read_tensors` finds the same fault, and says what to do
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            tensors = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
            if tensors and all(isinstance(name, str) for name in state):
                return state
    return read_tensors(path)


def read_tensors(path: str) -> Dict[str, torch.Tensor]:
    """Read a state dict saved by `torch.save` onto the CPU; runs no code in the file.

    Raises:
        ValueError: no such file, not a file of tensors (truncated, another format), or a pickle of something else.
    """
    if not os.path.isfile(path):
        hint = "a folder; name the file in it, such as mm_projector.bin" if os.path.isdir(path) else "no such file"
        raise ValueError(f"{path}: {hint}")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of no common type; its text is left out, because torch advises to run the file's code
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) cannot be read as tensors saved by torch.save "
            f"({type(error).__name__}). It is truncated, of another format, or holds other Python objects, "
            f"which are not loaded because they could run code; download or save it again"
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        kind = type(state_dict).__name__
        if isinstance(state_dict, dict):
            kind = "dict of " + ", ".join(sorted({type(value).__name__ for value in state_dict.values()}))
        raise ValueError(f"{path} holds a {kind}, not a state dict (names to tensors)")
    return {str(name): value for name, value in state_dict.items()}


def save_tensors(state_dict: Mapping[str, torch.Tensor], path: str) -> None:
    """Save a state dict by `torch.save`, beside `path` first, so that `path` is never a half-written file."""
    partial = path + ".partial"
    try:
        torch.save(dict(state_dict), partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def read_config(folder: str) -> Optional[Dict[str, Any]]:
    """``config.json`` of a folder as a dict, or None where there is none.

    Raises:
        ValueError: it is not JSON in UTF-8 as transformers reads it, or no object.
    """
    file = os.path.join(folder, "config.json")
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as stream:
        try:
            config = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON in UTF-8: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object; copy the config.json that was saved with the weights")
    return config


def read_tensor(folder: str, weight: Weight) -> torch.Tensor:
    """One tensor of a checkpoint."""
    path = os.path.join(folder, weight.file)
    if not path.endswith(".safetensors"):
        return load_bin(path)[weight.name]
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        return stream.get_tensor(weight.name)


def projector_weights(weights: Iterable[Weight]) -> Dict[str, Weight]:
    """Those of a projector, by their name behind ``mm_projector.``."""
    projector = {weight.name.split(MARK, 1)[1]: weight for weight in weights if MARK in weight.name}
    without_wrapper(projector)
    return projector
