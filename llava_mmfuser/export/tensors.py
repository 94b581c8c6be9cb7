"""Weights that are read and written one at a time: what a whole model needs in memory is its largest tensor."""

import functools
import json
import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Tuple

import torch

from ..checkpoints.files import DTYPES, Weight, load_bin, read_weights
from ..checkpoints.writing import Advance, Step, text

SHARD = 5 << 30  # bytes, transformers' own default
_CODES = {dtype: code for code, dtype in DTYPES.items()}  # safetensors' names


class Tensor(NamedTuple):
    """A tensor of the output: its dtype, shape, and what reads or makes it when it is written."""

    dtype: str
    shape: Tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()


def of(tensor: torch.Tensor) -> Tensor:
    """A tensor that is in memory already."""
    return Tensor(str(tensor.dtype)[6:], tuple(tensor.shape), lambda: tensor)


def headers(tensors: Mapping[str, Tensor]) -> Dict[str, Weight]:
    """What a weight file would say about them."""
    return {name: Weight("", name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def of_files(folder: str, files: Iterable[str]) -> Dict[str, Tensor]:
    """The tensors of some weight files of a folder by their names, files in order; the last of two counts.

    Raises:
        ValueError: a tensor that is not in floating point, as those of a quantised model; see `read_weights`.
    """
    found = {}
    opened = functools.lru_cache(maxsize=1)(_open)  # files are read one after the other
    for file in files:
        path = os.path.join(folder, file)
        for weight in read_weights(folder, file):
            if weight.name.endswith(("rotary_emb.inv_freq", "position_ids")):  # buffers that old versions saved
                continue
            if weight.dtype not in _CODES:
                raise ValueError(f"{path}: {weight.name} is {weight.dtype}; only weights in floating point are allowed")
            read = functools.partial(lambda path, name: opened(path)(name), path, weight.name)
            found[weight.name] = Tensor(weight.dtype, weight.shape, read)
    return found


def _open(path: str) -> Callable[[str], torch.Tensor]:
    """What reads a tensor of a weight file by its name."""
    if not path.endswith(".safetensors"):
        return load_bin(path).__getitem__
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor


def steps(tensors: Dict[str, Tensor]) -> List[Step]:
    """What writes them as safetensors: one file, or shards of at most `SHARD` bytes and their index."""
    groups: List[List[str]] = [[]]
    room = SHARD
    for name, tensor in tensors.items():
        if groups[-1] and tensor.size > room:
            groups.append([])
            room = SHARD
        groups[-1].append(name)
        room -= tensor.size
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    made = []
    for file, names in zip(files, groups):
        part = {name: tensors[name] for name in names}
        made.append(Step(file, sum(tensor.size for tensor in part.values()), functools.partial(_write, part)))
    if len(groups) > 1:
        weight_map = {name: file for file, names in zip(files, groups) for name in names}
        index = {"metadata": {"total_size": sum(step.size for step in made)}, "weight_map": weight_map}
        made.append(text("model.safetensors.index.json", json.dumps(index, indent=2) + "\n"))
    return made


def _write(tensors: Dict[str, Tensor], path: str, advance: Advance) -> None:
    """Write a safetensors file tensor by tensor; `safetensors.torch.save_file` would hold all of them in memory."""
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # safetensors keeps its data aligned
    with open(path, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            value = tensor.read().detach().contiguous()
            stream.write(value.reshape(-1).view(torch.uint8).numpy().data)
            advance(tensor.size)
