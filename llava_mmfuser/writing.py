"""Writing a folder file by file so that it can be interrupted: nothing half-written bears its final name."""

import contextlib
import copy
import errno
import json
import os
import shutil
from functools import partial
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch

from .inspection import load_bin, read_header

MANIFEST = ".llava_mmfuser.json"
PART = ".part"
_CHUNK = 16 << 20  # bytes

Advance = Callable[[int], Any]


class Step(NamedTuple):
    """One file of the output: its name, the bytes it will take, and what writes it to a given path."""

    name: str
    size: int
    write: Callable[[str, Advance], None]


def unchanged(source: str, name: str, link: bool) -> Step:
    """The file `source` under a name, copied or, if `link`, hard-linked."""
    return Step(name, 0 if link else os.path.getsize(source), partial(_link if link else _copy, source))


def renamed(source: str, rename: Callable[[str], str], extra: Optional[Dict[str, torch.Tensor]] = None) -> Step:
    """The weight file `source` with its tensors renamed and, in a ``.bin``, others added."""
    name = os.path.basename(source)
    size = os.path.getsize(source) + sum(value.nbytes for value in (extra or {}).values())
    if name.endswith(".safetensors"):
        return Step(name, size, partial(_write_renamed, source, rename))
    return Step(name, size, partial(_write_bin, source, rename, extra or {}))


def added(name: str, tensors: Dict[str, torch.Tensor]) -> Step:
    """A new weight file."""
    return Step(name, sum(value.nbytes for value in tensors.values()), partial(_write_new, tensors))


def text(name: str, content: str) -> Step:
    """A new text file."""
    return Step(name, len(content.encode()), partial(_write_text, content))


def _write_text(content: str, path: str, advance: Advance) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(content)
    advance(len(content.encode()))


def _copy(source: str, path: str, advance: Advance) -> None:
    with open(source, "rb") as old, open(path, "wb") as new:
        _stream(old, new, advance)


def _link(source: str, path: str, advance: Advance) -> None:
    try:
        os.link(os.path.realpath(source), path)  # the hub's cache holds symbolic links
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _copy(source, path, advance)


def _write_renamed(source: str, rename: Callable[[str], str], path: str, advance: Advance) -> None:
    """Copy a safetensors file under a header with new names."""
    header, start = read_header(source)
    text = json.dumps(
        {rename(name): entry for name, entry in header.items()}, ensure_ascii=False, separators=(",", ":")
    )
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)  # safetensors keeps its data aligned
    with open(source, "rb") as old, open(path, "wb") as new:
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        old.seek(start)
        _stream(old, new, advance)


def _write_bin(
    source: str, rename: Callable[[str], str], extra: Dict[str, torch.Tensor], path: str, advance: Advance
) -> None:
    old = load_bin(source)
    new = copy.copy(old)  # keeps the attribute _metadata of a module's state dict
    new.clear()
    new.update({rename(name): value for name, value in old.items()})
    new.update(extra)
    with open(path, "wb") as stream:
        torch.save(new, stream)
    advance(os.path.getsize(path))


def _write_new(tensors: Dict[str, torch.Tensor], path: str, advance: Advance) -> None:
    with open(path, "wb") as stream:
        if path.endswith(".safetensors" + PART):
            from safetensors.torch import save

            stream.write(save(tensors, metadata={"format": "pt"}))
        else:
            torch.save(tensors, stream)
    advance(sum(value.nbytes for value in tensors.values()))


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
            try:
                count = os.copy_file_range(old.fileno(), new.fileno(), min(left, _CHUNK))
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
            in_kernel = count > 0
        if not in_kernel:
            count = _write_all(new.fileno(), os.read(old.fileno(), min(left, _CHUNK)))
        if not count:
            raise OSError(errno.EIO, "the file ended early", old.name)
        left -= count
        advance(count)


def _write_all(descriptor: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return len(data)


def write_folder(source: str, out: str, steps: List[Step], command: Dict[str, Any]) -> int:
    """Carry out `steps` in ``OUT.incomplete``, which then becomes `out`.

    A file has its name only once it is complete and flushed, so that the same command goes on where another stopped.

    Args:
        source: the folder that the steps read; it must not change meanwhile.
        out: the folder to make.
        steps: what to write, in this order.
        command: what was asked for, to be compared when a run goes on.

    Returns:
        The number of files that were complete from an earlier run.

    Raises:
        ValueError: the unfinished work of another command, a disk that is too small, another run at the same time, or a
            changed input.
        OSError: writing failed; complete files stay in ``OUT.incomplete``.
    """
    out, source = os.path.abspath(out), os.path.abspath(source)
    parent, work = os.path.dirname(out), out + ".incomplete"
    record = {**command, "input": source, "files": _snapshot(source)}
    _check_unfinished(work, record, out)
    needed, free = sum(step.size for step in _unfinished(steps, work)), shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"{out} needs {needed} bytes ({needed / 1e9:.1f} GB), but only {free} bytes ({free / 1e9:.1f} GB) are free "
            f"in {parent}; free some, choose another place, or share unchanged weight files with the input by --link"
        )
    os.makedirs(work, exist_ok=True)
    with _locked(work):
        for name in os.listdir(work):
            if name.endswith(PART):
                os.unlink(os.path.join(work, name))
        todo = _unfinished(steps, work)
        if not os.path.exists(os.path.join(work, MANIFEST)):
            _place(work, text(MANIFEST, json.dumps(record)), lambda count: None)
        from tqdm import tqdm

        with tqdm(total=needed, unit="B", unit_scale=True, disable=None, desc=command["command"]) as bar:
            for step in todo:
                _place(work, step, bar.update)
        if _snapshot(source) != record["files"]:
            raise ValueError(f"{source} was changed in the meantime; delete {work} and run the same command again")
        if os.path.lexists(out):
            raise ValueError(f"{out} has appeared in the meantime; the result is complete in {work}, rename that")
        os.rename(work, out)  # before the manifest goes: without it nobody could go on
        os.unlink(os.path.join(out, MANIFEST))
        _flush(out)
        _flush(parent)
    return len(steps) - len(todo)


def _unfinished(steps: List[Step], work: str) -> List[Step]:
    return [step for step in steps if not os.path.lexists(os.path.join(work, step.name))]


def _place(folder: str, step: Step, advance: Advance) -> None:
    """Write one file under a temporary name, flush it, then give it its name.

    Raises:
        OSError: it could not be written; the temporary file is gone.
    """
    path = os.path.join(folder, step.name)
    try:
        step.write(path + PART, advance)
        _flush(path + PART)
        os.replace(path + PART, path)
        _flush(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path + PART)
        cause: Optional[BaseException] = error
        while isinstance(cause, RuntimeError):  # torch.save hides the reason
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            cause.errno,
            f"{cause.strerror or cause} while writing {path}; complete files stay in {folder}; "
            f"once the cause is gone (disk full: free some space), run the same command again to go on",
        ) from error


def _check_unfinished(work: str, record: Dict[str, Any], out: str) -> None:
    """Refuse to go on with another command's unfinished work."""
    if not os.path.lexists(work):
        return
    reason = "is no folder"
    if os.path.isdir(work):
        manifest = os.path.join(work, MANIFEST)
        begun = [name for name in os.listdir(work) if not name.endswith(PART)]
        if not begun:
            return
        reason = "was not made by this program"
        if MANIFEST in begun:
            with open(manifest, encoding="utf-8") as stream:
                before = json.load(stream)
            now = json.loads(json.dumps(record))
            if before == now:
                return
            different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            reason = f"is the unfinished result of a run with other {', '.join(different)}"
    raise ValueError(f"{work} {reason}; delete it, or choose another name than {out}")


def _snapshot(folder: str) -> Dict[str, List[int]]:
    """Name to size in bytes and time of last change in ns of the files in a folder."""
    with os.scandir(folder) as entries:
        stats = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {folder}; wait for it to end") from error
        yield
    finally:
        os.close(descriptor)


def _flush(path: str) -> None:
    """Make a file or, where the system can, a folder durable."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
