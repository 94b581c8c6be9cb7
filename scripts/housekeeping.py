"""What every long-running script needs: files written whole, folders held, process groups stopped, tables aligned."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, List, Sequence

GRACE = 10.0  # seconds between asking a process to stop and killing it


def write(file: Path, text: str) -> None:
    """Write beside the target, then rename: a reader or a rerun never meets half a file."""
    incomplete = file.with_name(file.name + ".incomplete")
    incomplete.write_text(text, encoding="utf-8")
    os.replace(incomplete, file)


@contextlib.contextmanager
def locked(folder: Path, holder: str) -> Iterator[int]:
    """Hold an existing folder for this process, and for every process that is given the file descriptor.

    Raises:
        ValueError: somebody else holds it; `holder` says who that may be.
    """
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another {holder}; wait for it, stop it, or give another --output"
            ) from None
        yield file.fileno()


def free_port() -> int:
    """A port of this machine that nothing listens on, so far."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this context SIGINT, SIGTERM and SIGHUP wait; they act as it ends. For the main thread only.

    For starting a process: an interrupt inside `subprocess.Popen` would leave one running that nobody knows. Unlike a
    signal mask, handlers are not inherited by what is started.
    """
    received: List[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask leaders of process groups to end, and kill what is left after `GRACE` or at the second Ctrl-C."""

    def send(number: int) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    try:
        send(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        send(signal.SIGKILL)


def exit_on_signals() -> None:
    """SIGTERM, and SIGHUP unless nohup ignores it, end this process as Ctrl-C does: as an exception."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def padded(rows: Sequence[Sequence[str]]) -> List[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]).rstrip()
        for name, *others in rows
    ]
