"""The study of docs/study.md on the demo's toy: every arm tuned on validation pictures, then judged over seeds.

Runs go side by side, and the same command again goes on where it stopped. It ends with report.md and curves.png.

  study.py --tables modules "attention kinds"             the arms of these tables
  study.py --arms mean mmfuser --own "wide: --mm_projector_type mmfuser --mm_fuser_num_points 4"
"""

import argparse
import collections
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import study_report
from housekeeping import exit_on_signals, locked, stop, uninterrupted, write
from study_report import BASELINE, Arm
from toy import arm as toy_arm
from toy.recipe import STAGES, STEPS
from toy.world import SIZES

from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.config import PROJECTOR_TYPE

PLAIN = "--mm_projector_type mlp2x_gelu"
FUSER = "--mm_projector_type mmfuser --mm_fuser_num_heads 4"
TWO_POINTS = f"{FUSER} --mm_fuser_num_points 2"
FUSION = "--mm_projector_type mmfuser --mm_fuser_fusion"
FINETUNED_ON = "released, finetuned on"
ARMS = {
    BASELINE: Arm(("controls",), PLAIN),
    "query, whitened": Arm(("controls",), f"{PLAIN} --toy_whiten"),
    "layer 3 alone": Arm(("controls",), f"{PLAIN} --mm_vision_select_layer 3", quick=False),
    "layer 4 alone": Arm(("controls",), f"{PLAIN} --mm_vision_select_layer 4"),
    "query, 4-layer MLP": Arm(("controls",), "--mm_projector_type mlp4x_gelu", quick=False),  # as large as the fuser
    "mean": Arm(("fusions",), f"{FUSION} mean"),
    "weighted_sum": Arm(("fusions",), f"{FUSION} weighted_sum", quick=False),
    "channel_concat": Arm(("fusions",), f"{FUSION} channel_concat"),
    "dense_channel, all layers": Arm(("fusions",), f"{FUSION} dense_channel --mm_fuser_layers all", quick=False),
    "mmfuser": Arm(("fusions", "layer sets", "attention kinds", "modules"), TWO_POINTS),
    "shallow": Arm(("layer sets",), f"{TWO_POINTS} --mm_fuser_layers shallow", quick=False),
    "middle": Arm(("layer sets",), f"{TWO_POINTS} --mm_fuser_layers middle", quick=False),
    "window": Arm(("attention kinds",), f"{FUSER} --mm_fuser_attention window"),
    "dense": Arm(("attention kinds",), f"{FUSER} --mm_fuser_attention dense", quick=False),
    "cross-attention only": Arm(("modules",), f"{TWO_POINTS} --mm_fuser_self_attention False"),
    FINETUNED_ON: Arm(("a released checkpoint",), f"{PLAIN} --toy_released", against=FINETUNED_ON),
    "released, with mmfuser": Arm(("a released checkpoint",), f"{TWO_POINTS} --toy_released", against=FINETUNED_ON),
}
TABLES = tuple(dict.fromkeys(table for arm in ARMS.values() for table in arm.tables))
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)
# A trial: a learning rate, and by how much that of an arm's new weights is higher: the fuser's, else the projector's.
Trial = Tuple[float, int]
TRIALS: Tuple[Trial, ...] = ((2e-3, 1), (2e-3, 5))
# LLaVA finetunes its language model at a lower rate than its projector. At the same one that of the toy unlearns to
# read what the plain map does not show, and in front of such a checkpoint no fuser wakes up.
RELEASED_RATE = 2e-4
SPLITS = {"validation": 300, "heldout": 600}  # pictures
RUN = (sys.executable, __file__, "run")  # makes a run, see toy/arm.py
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f}s] {text}", flush=True)


def trains_fusion(flags: Sequence[str]) -> bool:
    """Whether an arm has a fusion with weights of its own, which `--mm_fuser_lr` is for."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--mm_projector_type", default=PROJECTOR_TYPE)
    parser.add_argument("--mm_fuser_fusion")
    given = parser.parse_known_args(flags)[0]
    kind = FUSIONS.get(given.mm_fuser_fusion, FUSIONS["mmfuser"])  # train.py says what is wrong with an unknown one
    return given.mm_projector_type == PROJECTOR_TYPE and kind.has_weights


def setting(name: str, arm: Arm, trial: Trial) -> Tuple[str, Tuple[str, ...]]:
    """Name and flags of an arm with a trial's rates."""
    flags = shlex.split(arm.flags)
    own = "--mm_fuser_lr" if trains_fusion(flags) else "--mm_projector_lr"
    rate, times = trial
    rates = ("--learning_rate", str(RELEASED_RATE if "--toy_released" in flags else rate), own, str(rate * times))
    return f"{name}, {rate:g} x {times}", (*flags, *rates)


@dataclass(frozen=True)
class Run:
    """One arm with one trial and one seed; `folder` holds its log and, once it is done, its details.json."""

    label: str
    made: dict
    command: List[str]
    folder: Path

    def details(self) -> Optional[dict]:
        """What the run found; None if it is not done. Raises ValueError for the result of another run."""
        file = self.folder / "details.json"
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        if found["made"] != self.made:
            raise ValueError(f"{file} is of {found['made']}, not of {self.made}; delete it, or give another --output")
        return found

    def start(self, gpu: Optional[str], lock: int) -> subprocess.Popen:
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed or failed attempt left
        self.folder.mkdir(parents=True)
        environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
        with open(self.folder / "log.txt", "wb") as log:
            streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            # A session of its own, so that launchers are stopped together with their workers. It holds the lock, too.
            return subprocess.Popen(self.command, env=environment, start_new_session=True, pass_fds=(lock,), **streams)


def run_all(runs: Sequence[Run], gpus: Sequence[Optional[str]], lock: int) -> None:
    """Make what is not done, one at a time per entry of `gpus`; None leaves CUDA_VISIBLE_DEVICES alone.

    Whatever interrupts this also stops the runs that are under way; they are made again from scratch.

    Raises:
        ValueError: some failed.
    """
    waiting = collections.deque(run for run in runs if run.details() is None)
    count, started, free = len(waiting), time.monotonic(), collections.deque(gpus)
    active: List[Tuple[Run, Optional[str], subprocess.Popen]] = []
    failed: List[Run] = []
    try:
        while waiting or active:
            while waiting and free:
                run, gpu = waiting.popleft(), free.popleft()
                with uninterrupted():
                    active.append((run, gpu, run.start(gpu, lock)))
            for run, gpu, process in [entry for entry in active if entry[2].poll() is not None]:
                active.remove((run, gpu, process))
                free.append(gpu)
                done = run.details() is not None  # its last act
                failed += [] if done else [run]
                left = len(waiting) + len(active)
                minutes = (time.monotonic() - started) / (count - left) * left / 60
                say(f"{'done' if done else 'failed'}: {run.label} ({left} left, about {minutes:.0f} min)")
            time.sleep(0.05)
    finally:
        stop([process for *_, process in active])
    if failed:
        logs = ", ".join(str(run.folder / "log.txt") for run in failed)
        raise ValueError(f"{len(failed)} of {count} runs failed; the same command makes them again: {logs}")


class Study:
    """The runs below one folder. The first seed is that of the pictures, the tower and the language model, too."""

    def __init__(self, folder: Path, seeds: Sequence[int], arms: Mapping[str, Arm], gpus: Sequence[Optional[str]]):
        self.folder, self.world, self.seeds, self.arms, self.gpus = folder, folder / "world", seeds, arms, gpus
        self.device = "cpu" if None in gpus else "cuda"

    def prepare(self, lock: int) -> None:
        """Make the toy world, with what only a study needs of it: a probe, a whitening, a finished plain LLaVA."""
        sizes = {**{name: default for name, (default, _) in SIZES.items()}, **SPLITS}
        wanted = {**sizes, "seed": self.seeds[0]}
        if not self.world.exists():
            from toy.probe import probe
            from toy.whitening import fit_whitening
            from toy.world import make_world

            incomplete = self.world.with_name("world.incomplete")
            shutil.rmtree(incomplete, ignore_errors=True)
            make_world(incomplete, sizes, self.seeds[0], say)
            write(incomplete / "probe.json", json.dumps(probe(incomplete)))
            fit_whitening(incomplete, incomplete / toy_arm.WHITENING)
            write(incomplete / "world.json", json.dumps(wanted))
            incomplete.rename(self.world)
        made = json.loads((self.world / "world.json").read_text())
        for name in (name for name in wanted if made.get(name) != wanted[name]):
            what = f"{'the first seed' if name == 'seed' else name} {made.get(name)}, not {wanted[name]}"
            raise ValueError(f"{self.world} was made with {what}; use that, or give another --output")
        starts = any("--toy_released" in arm.flags for arm in self.arms.values())
        if starts and not (self.world / toy_arm.RELEASED).exists():
            say("Training the released checkpoint, a plain LLaVA")
            name, flags = setting(BASELINE, ARMS[BASELINE], TRIALS[0])
            flags += ("--toy_finetune_rate", str(RELEASED_RATE))
            run = self._run(f"released, {name}", flags, self.seeds[0], "--keep")
            run_all([run], self.gpus, lock)
            (run.folder / "llava-finetune").rename(self.world / toy_arm.RELEASED)

    def run(self, arm: str, trial: Trial, seed: int) -> Run:
        return self._run(*setting(arm, self.arms[arm], trial), seed)

    def _run(self, name: str, flags: Tuple[str, ...], seed: int, *more: str) -> Run:
        folder = self.folder / "runs" / f"{file_name(name)}-seed{seed}"
        steps = [default for default, _ in STEPS.values()]
        command = [*RUN, str(self.world), str(folder), "--seed", str(seed)]
        command += ["--steps", *map(str, steps), "--device", self.device, *more, "--", *flags]
        return Run(f"{name}, seed {seed}", toy_arm.made_by(flags, seed, steps, self.device), command, folder)

    def tune(self, lock: int) -> Dict[str, Trial]:
        """For every arm the trial whose first seed answers the most validation questions."""
        say(f"Tuning {len(self.arms)} arms, {len(TRIALS)} trials each")
        seed = self.seeds[0]
        run_all([self.run(arm, trial, seed) for arm in self.arms for trial in TRIALS], self.gpus, lock)

        def score(arm: str, trial: Trial) -> float:
            return study_report.share(self.run(arm, trial, seed).details(), "all", "validation")

        return {arm: max(TRIALS, key=functools.partial(score, arm)) for arm in self.arms}

    def judge(self, lock: int) -> Tuple[Dict[str, Trial], Dict[str, List[dict]]]:
        """Tune every arm, then train it with every seed: trials, and details by arm."""
        trials = self.tune(lock)
        say(f"Training {len(self.arms)} arms with {len(self.seeds)} seeds")
        run_all([self.run(arm, trials[arm], seed) for seed in self.seeds for arm in self.arms], self.gpus, lock)
        return trials, {arm: [self.run(arm, trials[arm], s).details() for s in self.seeds] for arm in self.arms}


def file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+,-]", "-", name)


def places(jobs: Optional[int]) -> List[Optional[str]]:
    """Where runs go side by side: two on every GPU, for the toy is small; else one on every processor core."""
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        return [gpus[index % len(gpus)] for index in range(jobs or 2 * len(gpus))]
    return [None] * (jobs or len(os.sched_getaffinity(0)))


def chosen(options: argparse.Namespace) -> Dict[str, Arm]:
    """The arms that were asked for, each with the one that it is compared with, in the order of `ARMS`."""
    arms = dict(ARMS)
    for text in options.own:
        name, colon, flags = (part.strip() for part in text.partition(":"))
        if not (name and colon) or file_name(name) in map(file_name, arms):
            raise ValueError(f'--own "{text}": write "NAME: FLAGS", with a name that no other arm has')
        arms[name] = Arm(("your own",), flags)
    wanted = {*options.arms, *(name for name, arm in arms.items() if {*arm.tables} & {*options.tables, "your own"})}
    if not wanted:
        wanted = {name for name, arm in arms.items() if arm.quick or not options.quick}
    wanted |= {BASELINE, *(arms[name].against for name in wanted)}
    return {name: arm for name, arm in arms.items() if name in wanted}


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".study"), help="runs and report; kept and reused")
    parser.add_argument("--quick", action="store_true", help="fewer arms and seeds: 40 minutes, not two hours")
    parser.add_argument("--seeds", type=int, nargs="+", help="not the design's; the first makes the toy, too")
    parser.add_argument("--jobs", type=int, help="runs side by side; if not given one per core, or two per GPU")
    parser.add_argument("--arms", nargs="+", default=[], choices=list(ARMS), metavar="ARM", help="these alone")
    parser.add_argument("--tables", nargs="+", default=[], choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--own", nargs="+", default=[], metavar='"NAME: FLAGS"', help="arms of your own")
    options = parser.parse_args(given)
    # One thread each, so that a run gives the same figures however many run beside it.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    seeds = tuple(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {' '.join(map(str, seeds))} has a seed twice; use each once")
    exit_on_signals()
    folder = options.output.resolve()
    try:
        study = Study(folder, seeds, chosen(options), places(options.jobs))
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "study.py, or by a run that one left behind") as lock:
            study.prepare(lock)
            probes = json.loads((study.world / "probe.json").read_text())
            say(study_report.premise(probes))
            trials, results = study.judge(lock)
            steps = dict(zip(STAGES, next(iter(results.values()))[0]["made"]["steps"]))
            report = study_report.report(steps, seeds, TRIALS, trials, results, study.arms, probes, study.device)
            write(folder / "report.md", report)
            study_report.draw(results, folder / "curves.png")
            print(report)
    except ValueError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(toy_arm.main(sys.argv[2:]) if sys.argv[1:2] == ["run"] else main(sys.argv[1:]))
