"""Runs Python programs in forks of one interpreter that has already imported the libraries which LLaVA imports.

Four fifths of a tiny run of train.py are such imports. LLaVA and this package are not among them: each run imports
those itself, so the hook acts in it as in a fresh process, which is forked before a library has computed anything.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# With all that these import, what a run of train.py has imported at its end: test_warm holds that it is no more.
LIBRARIES = """torch sklearn transformers.trainer transformers.models.llama.modeling_llama deepspeed
    transformers.models.llama.tokenization_llama transformers.models.clip.modeling_clip
    transformers.models.clip.image_processing_clip transformers.models.mpt.modeling_mpt
    transformers.models.mistral.modeling_mistral""".split()
# Libraries or the hook read these as they start: an interpreter for each of their values.
READ_AT_START = {"DS_ACCELERATOR", "LLAVA_MMFUSER_DISABLE"}
# These are read where they are used, or a fork catches up on them.
READ_LATE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
READ_LATE |= {"PYTHONPATH"}
_interpreters = {}


def runs(command, env, usual):
    """Whether a fork is the same as a fresh process: a script, `-c`, or `-m` with a module of LLaVA or of this package,
    in the `usual` environment but for the above."""
    differing = {name for name in {*env, *usual} if env.get(name) != usual.get(name)}
    ours = command[1] == "-m" and command[2].split(".")[0] in ("llava", "llava_mmfuser")
    python = command[0] == sys.executable and (ours or command[1] == "-c" or command[1].endswith(".py"))
    starts = any(Path(folder, "sitecustomize.py").exists() for folder in env.get("PYTHONPATH", "").split(os.pathsep))
    return python and not starts and differing <= READ_AT_START | READ_LATE


class Process:
    """A forked program, in a session of its own, with what `subprocess.Popen` offers for it."""

    def __init__(self, command, env, cwd, stdout):
        start = {name: value for name, value in env.items() if name not in READ_LATE}
        key = frozenset(start.items())
        if key not in _interpreters:
            _interpreters[key] = _Interpreter(start)
        self.args, self.returncode, self._interpreter = command, None, _interpreters[key]
        self._connection, theirs = socket.socketpair()
        with tempfile.TemporaryFile("w+") as request, theirs:
            json.dump({"command": command, "env": env, "cwd": str(cwd or os.getcwd())}, request)
            request.flush()
            fds = [theirs.fileno(), request.fileno(), stdout.fileno()]
            socket.send_fds(self._interpreter.control, [b"."], fds)
        self.pid = int(self._read())

    def _read(self):
        line = self._connection.recv(20)
        if not line:
            raise RuntimeError("the warm interpreter is gone:\n" + self._interpreter.log())
        return line

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self._read()))
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)


class _Interpreter:
    """Client's side of the interpreter; it ends, with all that it has forked, when this process does."""

    def __init__(self, env):
        self._log = tempfile.TemporaryFile("w+")
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self._end)

    def _end(self):
        self.control.close()
        self.process.wait()

    def log(self):
        self._log.seek(0)
        return self._log.read()[-6000:]


def _serve(control):
    """Fork for every request; return in the fork, with the request. Tell the client the fork's pid and its end."""
    connections = {}  # of a fork's pid
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready = select.select([control, woken, *connections.values()], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            with contextlib.suppress(ChildProcessError):
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    with contextlib.suppress(BrokenPipeError), connections.pop(pid) as connection:
                        connection.send(b"%d" % status)
        gone = [pid for pid, connection in connections.items() if connection in ready]
        if control in ready:
            message, fds, _, _ = socket.recv_fds(control, 1, 3)
            if not message:
                gone = list(connections)
            else:
                connection = socket.socket(fileno=fds[0])
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.setsid()
                    connection.send(b"%d" % os.getpid())
                    for socket_ in (control, connection, *connections.values()):
                        socket_.close()
                    os.close(woken), os.close(wake)
                    for standard in (1, 2):
                        os.dup2(fds[2], standard)
                    os.close(fds[2])
                    with open(fds[1]) as request:
                        request.seek(0)
                        return json.load(request)
                connections[pid] = connection
                os.close(fds[1]), os.close(fds[2])
        for pid in gone:  # the client has given up
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if control in ready and not message:
            return None


def draw_seeds():
    """Seed as a fresh interpreter does; Python's own generator is seeded anew by any fork."""
    import numpy
    import torch

    numpy.random.seed()
    torch.seed()


def _become(command, env, cwd):
    """Be the process that runs a command."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    draw_seeds()
    main = sys.modules["__main__"] = type(sys)("__main__")
    sys.path[:0] = [folder for folder in env["PYTHONPATH"].split(os.pathsep) if folder]
    if command[1] == "-m":
        sys.argv = command[2:]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(command[2])  # what `python -m` does
        return
    if command[1] == "-c":
        code, sys.argv = compile(command[2], "<string>", "exec"), ["-c", *command[3:]]
        sys.path.insert(0, "")
    else:
        main.__file__ = command[1]
        with open(command[1], "rb") as script:
            code, sys.argv = compile(script.read(), command[1], "exec"), command[1:]
        sys.path.insert(0, os.path.dirname(os.path.realpath(command[1])))
    exec(code, main.__dict__)


if __name__ == "__main__":
    import gc
    import importlib

    del sys.path[0]  # this folder
    for _name in LIBRARIES:
        importlib.import_module(_name)
    _threads = [Path(f"/proc/self/task/{_thread}/comm").read_text() for _thread in os.listdir("/proc/self/task")[1:]]
    if set(_threads) - {"jemalloc_bg_thd\n"}:  # pyarrow's allocator takes care of forks
        raise RuntimeError(f"threads that a fork would lack: {_threads}")
    gc.collect()
    gc.freeze()
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _request:
        _become(**_request)
