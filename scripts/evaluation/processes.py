"""Nothing that was started outlives the evaluation: no process keeps a GPU after Ctrl-C."""

import contextlib
import signal
import subprocess
import sys
import time
from typing import Callable, Iterator, Sequence

GRACE = 10.0  # seconds between asking a process to stop and killing it

Send = Callable[[subprocess.Popen, int], None]


@contextlib.contextmanager
def stopped_too(processes: Sequence[subprocess.Popen], send: Send = subprocess.Popen.send_signal) -> Iterator[None]:
    """Whatever interrupts the block stops `processes`; `send` signals one. A second Ctrl-C kills them at once."""
    try:
        yield
    except BaseException:
        try:
            for process in processes:
                send(process, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                send(process, signal.SIGKILL)
        raise


def exit_on_signals() -> None:
    """SIGTERM, and SIGHUP unless nohup ignores it, end this process as Ctrl-C does: as an exception."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
