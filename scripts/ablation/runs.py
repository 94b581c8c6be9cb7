"""The runs of an ablation: one command per setting and seed, queued over GPUs, each recorded when it ends."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from housekeeping import free_port, stop, uninterrupted, write

PLACEHOLDERS = ("flags", "seed", "output", "name", "port")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "llava", "llava-torch", "llava-mmfuser")
LAST_LOSSES = 10  # logged losses whose mean is the metric `loss`: one step alone is too noisy to compare


@dataclass(frozen=True)
class Run:
    """One setting with one seed. `folder` is its {output}; log and record lie beside it, where no command cleans up."""

    setting: str
    flags: Tuple[str, ...]
    seed: int
    template: Tuple[str, ...]
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.setting}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def record_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    def command(self, port: int) -> List[str]:
        """The command with its placeholders filled in; a lone {flags} becomes as many arguments as there are."""
        values = dict(seed=self.seed, output=self.folder, name=self.setting, port=port, flags=shlex.join(self.flags))
        command: List[str] = []
        for part in self.template:
            if part == "{flags}":
                command += self.flags
            else:
                command.append(
                    re.sub(r"\{(%s)\}" % "|".join(PLACEHOLDERS), lambda found: str(values[found.group(1)]), part)
                )
        return command

    def identity(self) -> Dict[str, object]:
        """What a record must agree with to stand for this run."""
        return {
            "setting": self.setting,
            "flags": list(self.flags),
            "seed": self.seed,
            "command": list(self.template),
        }

    def record(self) -> Optional[dict]:
        """The record of an earlier attempt, whatever became of it.

        Raises:
            ValueError: the record cannot be read, or is that of a finished run of something else.
        """
        if not self.record_file.exists():
            if self.folder.exists():
                raise ValueError(
                    f"{self.folder} exists, but {self.record_file.name} beside it does not, so it is not from here; "
                    f"move it away, or give another --output"
                )
            return None
        try:
            record = json.loads(self.record_file.read_text())
        except ValueError as error:
            raise ValueError(f"{self.record_file} is damaged ({error}); delete it, and the run is made again") from None
        different = [
            f"{name} {_show(record.get(name))} (now {_show(value)})"
            for name, value in self.identity().items()
            if record.get(name) != value
        ]
        if different and record["status"] == "done":
            raise ValueError(
                f"{self.record_file} is the result of another run: {'; '.join(different)}; "
                f"give another --output, or delete that file to run it again"
            )
        return record

    def done(self) -> bool:
        record = self.record()
        return record is not None and record["status"] == "done"


def _show(value: object) -> str:
    return (shlex.join(value) or "(none)") if isinstance(value, list) else str(value)


def versions() -> Dict[str, str]:
    """The versions next to this interpreter; a command that uses another one has to record its own."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def read_metrics(folder: Path) -> Dict[str, float]:
    """`loss`, the mean of the last logged losses in trainer_state.json, and the numbers of metrics.json (which wins).

    Raises:
        ValueError: there is neither, or something in metrics.json is not a number.
    """
    metrics: Dict[str, float] = {}
    state, own = folder / "trainer_state.json", folder / "metrics.json"
    if state.exists():
        losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        if losses:
            metrics["loss"] = sum(losses[-LAST_LOSSES:]) / len(losses[-LAST_LOSSES:])
    if own.exists():
        found = json.loads(own.read_text())
        if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
            raise ValueError(f"{own} is not of the form {{name: number, …}}")
        metrics.update(found)
    if not metrics:
        raise ValueError(f"it left neither a metrics.json nor a trainer_state.json with a loss in {folder}")
    return metrics


@dataclass
class _Running:
    run: Run
    gpu: Optional[str]
    command: List[str]
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)

    def finish(self) -> dict:
        """Record how the run ended; its metrics count only if everything about it is right."""
        problem, metrics = None, {}
        status = self.process.returncode
        if status < 0:
            problem = f"killed by {signal.Signals(-status).name}"
        elif status:
            problem = f"exit status {status}"
        else:
            try:
                metrics = read_metrics(self.run.folder)
            except (ValueError, KeyError, TypeError, OSError) as error:
                problem = f"no metrics: {error}"
        record = {
            "status": "failed" if problem else "done",
            **self.run.identity(),
            "ran": self.command,
            "gpu": self.gpu,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(time.monotonic() - self.started, 1),
            "problem": problem,
            "metrics": metrics,
            "versions": versions(),
        }
        write(self.run.record_file, json.dumps(record, indent=1))
        return record


def _start(run: Run, gpu: Optional[str], lock: int) -> _Running:
    write(run.record_file, json.dumps({"status": "running", **run.identity()}, indent=1))
    if run.folder.exists():
        shutil.rmtree(run.folder)  # what a killed or failed attempt left
    run.folder.mkdir()
    command = run.command(free_port())
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(run.log, "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that launchers are stopped together with their workers
            pass_fds=(lock,),
        )
    return _Running(run, gpu, command, process)


def run_all(
    runs: Sequence[Run],
    gpus: Sequence[Optional[str]],
    lock: int,
    started: Callable[[Run, Optional[str]], None],
    ended: Callable[[Run, dict], None],
) -> None:
    """Run everything, one at a time per entry of `gpus`; (None,) leaves CUDA_VISIBLE_DEVICES alone.

    Whatever interrupts this also stops the runs that are under way. They stay recorded as running, so that they are
    made again from scratch.
    """
    waiting, free = deque(runs), deque(gpus)
    active: List[_Running] = []
    try:
        while waiting or active:
            while waiting and free:
                run, gpu = waiting.popleft(), free.popleft()
                with uninterrupted():
                    active.append(_start(run, gpu, lock))
                started(run, gpu)
            for running in [running for running in active if running.process.poll() is not None]:
                active.remove(running)
                free.append(running.gpu)
                ended(running.run, running.finish())
            time.sleep(0.05)
    finally:
        stop([running.process for running in active])
