"""Writing a folder: nothing half-written bears its final name."""

import contextlib
import copy
import errno
import functools
import json
import operator
import os
import shutil
from typing import Any, BinaryIO, Callable, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch

from .files import DTYPES, Weight, load_bin, read_header

SHARD = 5 << 30  # bytes, transformers' own default
_CODES = {dtype: code for code, dtype in DTYPES.items()}  # safetensors' names
_CHUNK = 16 << 20  # bytes
_CODE = (".py", ".pyc", ".pyd", ".pyw", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1")
_POINTERS = ("auto_map", "custom_pipelines")  # keys in JSON by which transformers finds code

Advance = Callable[[int], Any]


class Step(NamedTuple):
    """One file of the output: its name, the bytes it will take, and what writes it to a path."""

    name: str
    size: int
    write: Callable[[str, Advance], None]


def unchanged(source: str, name: str, link: bool) -> Step:
    """The file `source` under a name, copied or, if `link`, hard-linked."""
    return Step(name, 0 if link else os.path.getsize(source), functools.partial(_link if link else _copy, source))


def carried(
    folder: str, names: List[str], own: Collection[str], linked: Collection[str]
) -> Tuple[List[Step], List[str]]:
    """The steps that copy files of a folder which no command reads, but for its `own`, and hard-link those `linked`.

    No code is copied, and nothing that points to code; what is left out is returned for `code_note`. A symbolic link
    that leads out of the folder is refused.
    """
    steps, code = [], []
    for name in names:
        path = os.path.join(folder, name)
        if name.lower().endswith(_CODE):
            code.append(name)
            continue
        if name in own:
            continue
        _refuse_foreign(folder, path)
        step = unchanged(path, name, name in linked)
        if name.endswith(".json"):
            try:
                with open(path, encoding="utf-8") as stream:
                    before = json.load(stream)
                after = without_pointers(before)
            except ValueError:  # nor can transformers read it
                before = after = None
            except RecursionError:
                code.append(name)
                continue
            if after != before:
                step = as_json(name, after)
                code.append(f"auto_map in {name}")
        steps.append(step)
    return steps, code


def code_note(code: List[str]) -> List[str]:
    return [f"left out, because it is code of others or points to some: {', '.join(code)}"] if code else []


def without_pointers(content: Any) -> Any:
    """What a JSON file holds, without the entries that make transformers run code."""
    if isinstance(content, dict):
        pointers = {key for key in _POINTERS if not isinstance(content.get(key), (int, float))}  # else a vocabulary
        return {key: without_pointers(value) for key, value in content.items() if key not in pointers}
    return [without_pointers(value) for value in content] if isinstance(content, list) else content


def _refuse_foreign(folder: str, path: str) -> None:
    """Raise ValueError for a link to a file that is neither in the folder nor in its part of the hub's cache."""
    folder, target = os.path.realpath(folder), os.path.realpath(path)
    parent = os.path.dirname(folder)
    cache = os.path.join(os.path.dirname(parent), "blobs")
    allowed = [folder, cache] if os.path.basename(parent) == "snapshots" else [folder]
    if not any(target.startswith(root + os.sep) for root in allowed):
        raise ValueError(f"{path} is a link to {target}, outside the folder; copy that file here, or delete the link")


def renamed(source: str, rename: Callable[[str], str], extra: Mapping[str, Weight] = {}) -> Step:
    """The weight file `source` with its tensors renamed and, in a ``.bin``, others added."""
    name, size = os.path.basename(source), os.path.getsize(source) + sum(weight.size for weight in extra.values())
    if name.endswith(".safetensors"):
        return Step(name, size, functools.partial(_write_renamed, source, rename))
    return Step(name, size, functools.partial(_write_bin, source, rename, extra))


def added(name: str, weights: Mapping[str, Weight]) -> Step:
    size = sum(weight.size for weight in weights.values())
    if name.endswith(".safetensors"):
        return Step(name, size, functools.partial(_write_safetensors, weights))
    return Step(name, size, functools.partial(_write_bin, None, str, weights))


def shards(weights: Mapping[str, Weight]) -> List[Step]:
    """A whole model as safetensors: one file, or shards of at most `SHARD` bytes and their index."""
    groups: List[Dict[str, Weight]] = [{}]
    room = SHARD
    for name, weight in weights.items():
        if groups[-1] and weight.size > room:
            groups.append({})
            room = SHARD
        groups[-1][name] = weight
        room -= weight.size
    if len(groups) == 1:
        return [added("model.safetensors", weights)]
    names = shard_names("model", ".safetensors", len(groups))
    steps = [added(file, group) for file, group in zip(names, groups)]
    weight_map = {name: file for file, group in zip(names, groups) for name in group}
    index = {"metadata": {"total_size": sum(step.size for step in steps)}, "weight_map": weight_map}
    return [*steps, as_json("model.safetensors.index.json", index)]


def shard_names(stem: str, ending: str, total: int) -> List[str]:
    return [f"{stem}-{number:05d}-of-{total:05d}{ending}" for number in range(1, total + 1)]


def as_json(name: str, content: Any) -> Step:
    return text(name, json.dumps(content, indent=2) + "\n")


def text(name: str, content: str) -> Step:
    encoded = content.encode()

    def write(path: str, advance: Advance) -> None:
        with open(path, "wb") as stream:
            stream.write(encoded)
        advance(len(encoded))

    return Step(name, len(encoded), write)


def _copy(source: str, path: str, advance: Advance) -> None:
    with open(source, "rb") as old, open(path, "wb") as new:
        _stream(old, new, advance)
    shutil.copymode(source, path)


def _link(source: str, path: str, advance: Advance) -> None:
    try:
        os.link(os.path.realpath(source), path)  # the hub's cache holds symbolic links
    except OSError:
        _copy(source, path, advance)


def _write_renamed(source: str, rename: Callable[[str], str], path: str, advance: Advance) -> None:
    """Copy a safetensors file under a header with new names."""
    header, start = read_header(source)
    with open(source, "rb") as old, open(path, "wb") as new:
        _write_header({rename(name): entry for name, entry in header.items()}, new)
        old.seek(start)
        _stream(old, new, advance)
    shutil.copymode(source, path)


def _write_header(header: Dict[str, Any], stream: BinaryIO) -> None:
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # safetensors keeps its data aligned
    stream.write(len(encoded).to_bytes(8, "little") + encoded)


def _write_safetensors(weights: Mapping[str, Weight], path: str, advance: Advance) -> None:
    """Write tensor by tensor; `safetensors.torch.save_file` would hold all of them in memory."""
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.size
        header[name] = {"dtype": _CODES[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    with open(path, "wb") as stream:
        _write_header(header, stream)
        for weight in weights.values():
            stream.write(weight.read().detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(weight.size)


def _write_bin(
    source: Optional[str], rename: Callable[[str], str], extra: Mapping[str, Weight], path: str, advance: Advance
) -> None:
    old = load_bin(source) if source else {}
    new = copy.copy(old)  # keeps the attribute _metadata of a module's state dict
    new.clear()
    new.update({rename(name): value for name, value in old.items()})
    new.update({name: weight.read() for name, weight in extra.items()})
    with open(path, "wb") as stream:
        torch.save(new, stream)
    if source:
        shutil.copymode(source, path)
    advance(os.path.getsize(path))


def _stream(old: BinaryIO, new: BinaryIO, advance: Advance) -> None:
    """Copy from the positions of both files to the end of `old`, inside the kernel where it can, which shares blocks on
    file systems with reflinks."""
    new.flush()
    left = os.fstat(old.fileno()).st_size - old.tell()
    os.lseek(old.fileno(), old.tell(), os.SEEK_SET)  # `old` may have read ahead
    in_kernel = hasattr(os, "copy_file_range")
    while left:
        count = 0
        if in_kernel:
            with contextlib.suppress(OSError):  # a full disk stops the other way, too
                count = os.copy_file_range(old.fileno(), new.fileno(), min(left, _CHUNK))
            in_kernel = count > 0
        if not in_kernel:
            count = new.write(os.read(old.fileno(), min(left, _CHUNK)))
            new.flush()
        if not count:
            raise OSError(errno.EIO, "the file ended early", old.name)
        left -= count
        advance(count)


def write_folder(source: str, out: str, steps: List[Step], command: str) -> None:
    """Carry out `steps` in ``OUT.incomplete``, which then becomes `out`; what fails or is interrupted leaves nothing.

    `source` is the folder that the steps read, and `command` what the progress bar is called.
    """
    from tqdm import tqdm

    out = os.path.abspath(out)
    parent, work, before = os.path.dirname(out), out + ".incomplete", _snapshot(source)
    modes = {entry.name: entry.stat().st_mode for entry in os.scandir(source) if entry.is_file()}
    narrowest = functools.reduce(operator.and_, modes.values(), 0o777)
    needed, free = sum(step.size for step in steps), shutil.disk_usage(parent).free
    if needed > free:
        sizes = f"{needed} bytes ({needed / 1e9:.1f} GB), but only {free} bytes ({free / 1e9:.1f} GB) are free in"
        advice = "free some, choose another place, or share unchanged weight files with the input by --link"
        raise ValueError(f"{out} needs {sizes} {parent}; {advice}")
    try:
        os.mkdir(work, os.stat(source).st_mode & 0o777 | 0o700)
    except FileExistsError as error:
        why = "a run that was killed left it, or another is writing to it"
        raise ValueError(f"{work} exists: {why}; delete it if none is, or choose another name than {out}") from error
    try:
        with tqdm(total=needed, unit="B", unit_scale=True, disable=None, desc=command) as bar:
            for step in steps:
                path, mode = os.path.join(work, step.name), modes.get(step.name, narrowest)
                _carry_out(step, path, bar.update)
                found = os.stat(path)
                if found.st_nlink == 1 and found.st_mode & ~mode & 0o077:  # nobody may read it who could not before
                    os.chmod(path, found.st_mode & (mode | 0o700) & 0o777)
        if _snapshot(source) != before:
            raise ValueError(f"{source} was changed in the meantime; run the same command again")
        if os.path.lexists(out):
            raise ValueError(f"{out} has appeared in the meantime; choose another name")
        _flush(work)
        os.rename(work, out)
        _flush(parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _carry_out(step: Step, path: str, advance: Advance) -> None:
    try:
        step.write(path, advance)
        _flush(path)
    except (OSError, RuntimeError) as error:
        cause: Optional[BaseException] = error
        while isinstance(cause, RuntimeError):  # torch.save hides the reason
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise
        text = f"{cause.strerror or cause} while writing {path}; nothing is left of it: run the same command again"
        raise OSError(cause.errno, f"{text} once the cause is gone (disk full: free some space)") from error


def _snapshot(folder: str) -> Dict[str, Tuple[int, int]]:
    """Name to size in bytes and time of last change in ns of the files in a folder."""
    with os.scandir(folder) as entries:
        return {entry.name: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries if entry.is_file()}


def _flush(path: str) -> None:
    """Make a file or, where the system can, a folder durable."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
