"""Weights that are read and written one at a time: what a whole model needs in memory is its largest tensor."""

import errno
import functools
import json
import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Tuple

import torch

from ..checkpoints.files import DTYPES, Weight, load_bin, read_header, read_weights, refuse_nan
from ..checkpoints.writing import Advance, Step, text

SHARD = 5 << 30  # bytes, transformers' own default
_CODES = {dtype: code for code, dtype in DTYPES.items()}  # safetensors' names
_MAPPED = 256 << 20  # bytes of a ``.bin`` that may be in memory at once


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
    for file in files:
        path = os.path.join(folder, file)
        read = _Safetensors(path) if file.endswith(".safetensors") else _Bin(path)
        for weight in read_weights(folder, file):
            if weight.name.endswith(("rotary_emb.inv_freq", "position_ids")):  # buffers that old versions saved
                continue
            if weight.dtype not in _CODES:
                raise ValueError(f"{path}: {weight.name} is {weight.dtype}; only weights in floating point are allowed")
            found[weight.name] = Tensor(weight.dtype, weight.shape, functools.partial(read, weight))
    return found


class _Safetensors:
    """Reads the tensors of a file without mapping it: a mapped file counts as memory, and its end may be cut off."""

    def __init__(self, path: str):
        self.path = path
        self.header, self.start = read_header(path)

    def __call__(self, weight: Weight) -> torch.Tensor:
        begin, end = self.header[weight.name]["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start + begin)
            view = memoryview(data.numpy().data)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise OSError(errno.EIO, "the file ended early", self.path)
                view = view[count:]
        return data.view(getattr(torch, weight.dtype)).view(weight.shape)


class _Bin:
    """Reads the tensors of a mapped file, which is mapped again before too much of it is in memory."""

    def __init__(self, path: str):
        self.path = path
        self.state: Dict[str, torch.Tensor] = {}
        self.read = 0

    def __call__(self, weight: Weight) -> torch.Tensor:
        if not self.state or self.read > _MAPPED:
            self.state, self.read = load_bin(self.path), 0
        self.read += self.state[weight.name].nbytes
        return self.state[weight.name]


def refuse_not_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """See `refuse_nan`."""
    for name, tensor in tensors.items():
        refuse_nan(where, name, tensor.read())


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
