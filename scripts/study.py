"""The study of docs/study.md on the demo's toy: every arm tuned on validation pictures, then judged over seeds.

The runs are those of an ablation (scripts/ablation): side by side, and the same command again goes on where it stopped.
report.md and curves.png in the output folder are made at the end.
"""

import argparse
import functools
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from ablation import study_report, toy_run
from ablation.command import folder_name
from ablation.runs import Run, run_all
from ablation.study_report import BASELINE, Arm
from housekeeping import exit_on_signals, locked, write

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
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)
STEPS = {"pretrain_steps": 150, "finetune_steps": 250}
# A trial: a learning rate, and by how much that of an arm's new weights is higher: the fuser's, else the projector's.
Trial = Tuple[float, int]
TRIALS: Tuple[Trial, ...] = ((2e-3, 1), (2e-3, 5))
# LLaVA finetunes its language model at a lower rate than its projector. At the same one that of the toy unlearns to
# read what the plain map does not show, and in front of such a checkpoint no fuser wakes up.
RELEASED_RATE = 2e-4
SPLITS = {"validation": 300, "heldout": 600}  # pictures


def setting(arm: str, trial: Trial) -> Tuple[str, Tuple[str, ...]]:
    """Name and flags of an arm with a trial's rates."""
    flags = shlex.split(ARMS[arm].flags)
    own = "--mm_fuser_lr" if toy_run.trains_fusion(flags) else "--mm_projector_lr"
    rate, times = trial
    rates = ("--learning_rate", str(RELEASED_RATE if "--toy_released" in flags else rate), own, str(rate * times))
    return f"{arm}, {rate:g} x {times}", (*flags, *rates)


class Study:
    """The runs below one folder.

    Args:
        folder: of everything.
        seeds: of the trainings; the first is that of the pictures, the tower and the language model, too.
        arms: names in ARMS.
        gpus: as in `ablation.runs.run_all`; without CUDA one None per run side by side.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], arms: Sequence[str], gpus: Sequence[Optional[str]]):
        self.folder, self.world, self.seeds, self.arms, self.gpus = folder, folder / "world", seeds, arms, gpus
        sizes = {name: default for name, (default, _) in toy_run.WORLD.items()}
        on_gpu = [gpu for gpu in gpus if gpu is not None]
        self.options = argparse.Namespace(**{**sizes, **SPLITS, **STEPS}, gpus=on_gpu)

    def prepare(self, lock: int) -> None:
        """Make the toy world, with what only a study needs of it: a probe, a whitening, a finished plain LLaVA."""
        if not toy_run.world_is_made(self.world, self.options):
            from toy.probe import probe
            from toy.whitening import fit_whitening

            incomplete = self.world.with_name("world.incomplete")
            shutil.rmtree(incomplete, ignore_errors=True)
            sizes = {name: getattr(self.options, name) for name in toy_run.WORLD}
            toy_run.make_world(incomplete, sizes, self.seeds[0], say)
            write(incomplete / "probe.json", json.dumps(probe(incomplete)))
            fit_whitening(incomplete, incomplete / toy_run.WHITENING)
            write(incomplete / "world.json", json.dumps({**sizes, "seed": self.seeds[0]}))
            incomplete.rename(self.world)
        made = json.loads((self.world / "world.json").read_text())
        if made["seed"] != self.seeds[0]:
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))}: {self.world} was made with the first seed {made['seed']}; "
                f"begin with it, or give another --output"
            )
        starts = any("--toy_released" in ARMS[arm].flags for arm in self.arms)
        if starts and not (self.world / toy_run.RELEASED).exists():
            say("Training the released checkpoint, a plain LLaVA")
            name, flags = setting(BASELINE, TRIALS[0])
            rate = ("--toy_finetune_rate", str(RELEASED_RATE))
            run = self._run(f"released, {name}", (*flags, *rate), self.seeds[0])
            self.make([run], lock, keep=True)
            (run.folder / "llava-finetune").rename(self.world / toy_run.RELEASED)

    @property
    def device(self) -> str:
        return "cuda" if self.options.gpus else "cpu"

    def run(self, arm: str, trial: Trial, seed: int) -> Run:
        return self._run(*setting(arm, trial), seed)

    def _run(self, name: str, flags: Tuple[str, ...], seed: int) -> Run:
        template = tuple(toy_run.run_command(self.world, self.options))
        return Run(name, flags, seed, template, self.folder / "runs" / f"{folder_name(name)}-seed{seed}")

    def make(self, runs: Sequence[Run], lock: int, keep: bool = False) -> None:
        """Make those of `runs` that are not done; without `keep` their weights are deleted, which would fill a disk.

        Raises:
            ValueError: one failed, or is recorded as another run.
        """
        waiting = [run for run in runs if not run.done()]
        left, started = len(waiting), time.monotonic()
        failed: List[Run] = []

        def ended(run: Run, record: dict) -> None:
            nonlocal left
            left -= 1
            for stage in () if keep else toy_run.STAGES:
                shutil.rmtree(run.folder / f"llava-{stage}", ignore_errors=True)
            minutes = (time.monotonic() - started) / (len(waiting) - left) * left / 60
            failed.extend([run] if record["status"] != "done" else [])
            say(f"{record['status']}: {run.label} ({left} left, about {minutes:.0f} min)")

        run_all(waiting, self.gpus, lock, lambda *_: None, ended)
        if failed:
            logs = ", ".join(str(run.log) for run in failed)
            raise ValueError(f"{len(failed)} of {len(waiting)} runs failed; the same command makes them again: {logs}")

    def tune(self, lock: int) -> Dict[str, Trial]:
        """For every arm the trial whose first seed answers the most validation questions."""
        say(f"Tuning {len(self.arms)} arms, {len(TRIALS)} trials each")
        seed = self.seeds[0]
        self.make([self.run(arm, trial, seed) for arm in self.arms for trial in TRIALS], lock)

        def score(arm: str, trial: Trial) -> float:
            return study_report.share(details(self.run(arm, trial, seed)), "all", "validation")

        return {arm: max(TRIALS, key=functools.partial(score, arm)) for arm in self.arms}

    def judge(self, lock: int) -> Tuple[Dict[str, Trial], Dict[str, List[dict]]]:
        """Tune every arm, then train it with every seed: trials, and details by arm."""
        trials = self.tune(lock)
        say(f"Training {len(self.arms)} arms with {len(self.seeds)} seeds")
        self.make([self.run(arm, trials[arm], seed) for seed in self.seeds for arm in self.arms], lock)
        return trials, {arm: [details(self.run(arm, trials[arm], seed)) for seed in self.seeds] for arm in self.arms}


def details(run: Run) -> dict:
    return json.loads((run.folder / "details.json").read_text())


START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f}s] {text}", flush=True)


def places(jobs: Optional[int]) -> List[Optional[str]]:
    """Where runs go side by side: two on every GPU, for the toy is small; else one on every processor core."""
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        return [gpus[index % len(gpus)] for index in range(jobs or 2 * len(gpus))]
    return [None] * (jobs or len(os.sched_getaffinity(0)))


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".study"), help="runs and report; kept and reused")
    parser.add_argument("--quick", action="store_true", help="fewer arms and seeds: 40 minutes, not two hours")
    parser.add_argument("--seeds", type=int, nargs="+", help="not the design's; the first makes the toy, too")
    parser.add_argument("--jobs", type=int, help="runs side by side; if not given one per core, or two per GPU")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"{BASELINE}, and these alone")
    options = parser.parse_args(given)
    # One thread each, so that a run gives the same figures however many run beside it.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    seeds = tuple(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {' '.join(map(str, seeds))} has a seed twice; use each once")
    exit_on_signals()
    folder = options.output.resolve()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    wanted = {name for name, arm in ARMS.items() if arm.quick or not options.quick}
    if options.arms:
        wanted = {BASELINE, *options.arms, *(ARMS[arm].against for arm in options.arms)}
    study = Study(folder, seeds, [arm for arm in ARMS if arm in wanted], places(options.jobs))
    try:
        with locked(folder, "study.py") as lock:
            study.prepare(lock)
            probes = json.loads((study.world / "probe.json").read_text())
            say(study_report.premise(probes))
            trials, results = study.judge(lock)
            arms = {name: ARMS[name] for name in study.arms}
            report = study_report.report(STEPS, seeds, TRIALS, trials, results, arms, probes, study.device)
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
    sys.exit(main(sys.argv[1:]))
