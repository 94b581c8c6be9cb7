"""The study of docs/study.md on the demo's toy: every arm tuned on validation pictures, then judged over seeds.

The same command again goes on where it stopped; report.md and curves.png in the output folder are made at the end.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from ablation import study_report
from housekeeping import exit_on_signals, locked, write
from toy import asking, recipe
from toy.probe import probe
from toy.whitening import fit_whitening, whitened
from toy.world import SIZES, make_world

from llava_mmfuser.block.kinds import FUSIONS

FUSER = {"mm_projector_type": "mmfuser", "mm_fuser_num_heads": 4, "mm_fuser_num_points": 2}
PLAIN = {"mm_projector_type": "mlp2x_gelu"}


def fusion(name: str, **flags: object) -> Dict[str, object]:
    return {"mm_projector_type": "mmfuser", "mm_fuser_fusion": name, **flags}


class Arm(NamedTuple):
    """One row of the report. `quick` arms are those of --quick; `whiten` puts a whitening behind the tower."""

    table: str
    flags: Dict[str, object]
    quick: bool = True
    whiten: bool = False


Trial = Tuple[float, int]
BASELINE = "query alone"
ARMS = {
    BASELINE: Arm("controls", PLAIN),
    "query, whitened": Arm("controls", PLAIN, whiten=True),
    "layer 3 alone": Arm("controls", {**PLAIN, "mm_vision_select_layer": 3}, quick=False),
    "layer 4 alone": Arm("controls", {**PLAIN, "mm_vision_select_layer": 4}),
    "query, 4-layer MLP": Arm("controls", {"mm_projector_type": "mlp4x_gelu"}, quick=False),  # as large as the fuser
    "mean": Arm("fusions", fusion("mean")),
    "weighted_sum": Arm("fusions", fusion("weighted_sum"), quick=False),
    "channel_concat": Arm("fusions", fusion("channel_concat")),
    "dense_channel, all layers": Arm("fusions", fusion("dense_channel", mm_fuser_layers="all"), quick=False),
    "mmfuser": Arm("fusions", FUSER),
    "shallow": Arm("layer sets", {**FUSER, "mm_fuser_layers": "shallow"}, quick=False),
    "middle": Arm("layer sets", {**FUSER, "mm_fuser_layers": "middle"}, quick=False),
    "window": Arm(
        "attention kinds",
        {"mm_projector_type": "mmfuser", "mm_fuser_num_heads": 4, "mm_fuser_attention": "window"},
    ),
    "dense": Arm(
        "attention kinds",
        {"mm_projector_type": "mmfuser", "mm_fuser_num_heads": 4, "mm_fuser_attention": "dense"},
        quick=False,
    ),
    "cross-attention only": Arm("modules", {**FUSER, "mm_fuser_self_attention": False}),
}
# A trial: a learning rate, and by how much that of an arm's new weights is higher: the fuser's, else the projector's.
TRIALS = ((2e-3, 1), (2e-3, 5))
FULL = {"trials": TRIALS, "seeds": (0, 1, 2, 3, 4), "steps": {"pretrain": 200, "finetune": 300}}
QUICK = {"trials": TRIALS, "seeds": (0, 1, 2), "steps": {"pretrain": 150, "finetune": 250}}
SPLITS = {"validation": 300, "heldout": 600}  # pictures


class Study:
    """The runs below one folder."""

    def __init__(
        self,
        folder: Path,
        quick: bool,
        device: str,
        seeds: Optional[Sequence[int]] = None,
        arms: Optional[Sequence[str]] = None,
    ):
        self.folder, self.device = folder, device
        self.design = QUICK if quick else FULL
        self.seeds = tuple(seeds or self.design["seeds"])
        wanted = {name for name, arm in ARMS.items() if arm.quick or not quick} if arms is None else {BASELINE, *arms}
        self.arms = {name: arm for name, arm in ARMS.items() if name in wanted}
        self.world = folder / "world"

    def prepare(self) -> None:
        """Make the toy world and probe its tower, once."""
        if not self.world.exists():
            incomplete = self.folder / "world.incomplete"
            sizes = {name: default for name, (default, _) in SIZES.items()}
            make_world(incomplete, {**sizes, **SPLITS}, 0, say)
            write(incomplete / "probe.json", json.dumps(probe(incomplete)))
            fit_whitening(incomplete, incomplete / "whitening.pt")
            incomplete.rename(self.world)

    def file(self, arm: str, trial: Trial, seed: int) -> Path:
        name = arm.replace(" ", "-").replace(",", "")
        return self.folder / "runs" / f"{name}-rate{trial[0]:g}x{trial[1]}-seed{seed}" / "result.json"

    def run(self, arm: str, trial: Trial, seed: int) -> dict:
        """Train and question one model, or read what an earlier call found."""
        file = self.file(arm, trial, seed)
        identity = {"flags": self.arms[arm].flags, "steps": self.design["steps"], "trial": list(trial), "seed": seed}
        if file.exists():
            found = json.loads(file.read_text())
            if {name: found[name] for name in identity} != identity:
                raise ValueError(f"{file} is of another design; give another --output")
            return found
        say(f"{arm}, rate {trial[0]:g} x {trial[1]}, seed {seed}")
        file.parent.mkdir(parents=True, exist_ok=True)
        found = {**identity, **self._train(arm, trial, seed, file.parent), **self._ask(arm, file.parent)}
        write(file, json.dumps(found))
        return found

    def _inside(self, arm: str, function: Callable) -> Callable:
        whitening = self.world / "whitening.pt"
        return functools.partial(whitened, whitening, function) if self.arms[arm].whiten else function

    def _train(self, arm: str, trial: Trial, seed: int, folder: Path) -> dict:
        losses, gates, seconds, adapter = [], [], 0.0, None
        flags = self.arms[arm].flags
        weightless = not FUSIONS[flags.get("mm_fuser_fusion", "mmfuser")].has_weights
        own = "mm_fuser_lr" if flags["mm_projector_type"] == "mmfuser" and not weightless else "mm_projector_lr"
        given = {**recipe.DEMO, **flags, "learning_rate": trial[0], own: trial[0] * trial[1]}
        for stage in recipe.STAGES:
            output = folder / f"llava-{stage}"
            given.update(max_steps=self.design["steps"][stage], pretrain_mm_mlp_adapter=adapter)
            given.update(use_cpu=self.device == "cpu")
            arguments = recipe.train_arguments(self.world, output, stage, **given)
            run = self._inside(arm, recipe.run_train_py)
            seconds += recipe.train(arguments, seed, folder / f"{stage}.log", run)
            losses.append(recipe.curve(output, "loss"))
            gates.append(recipe.curve(output, "mm_fuser_cross_gate"))
            adapter = output / "mm_projector.bin"
        return {"losses": losses, "gates": gates, "seconds": seconds}

    def _ask(self, arm: str, folder: Path) -> dict:
        """Which questions of both splits were answered right. Only `judge` looks at those of the held-out one."""
        right, parameters = {}, 0
        for split in SPLITS:
            records = json.loads((self.world / "data" / f"{split}.json").read_text())
            answer = self._inside(arm, asking.answer)
            model, data, log = folder / "llava-finetune", self.world / "data", folder / f"{split}.log"
            found = recipe.in_child(answer, model, data, records, self.device, log=log)
            right[split] = {
                kind: [int(text == str(record[kind])) for text, record in zip(given, records)]
                for kind, given in found["answers"].items()
            }
            parameters = found["parameters"]
        return {"right": right, "parameters": parameters}

    def tune(self, arm: str) -> Trial:
        """The trial whose first seed answers the most validation questions."""
        scores = {}
        for trial in self.design["trials"]:
            right = self.run(arm, trial, self.seeds[0])["right"]["validation"]
            scores[trial] = np.mean([np.mean(answers) for answers in right.values()])
        return max(scores, key=scores.get)

    def judge(self) -> Tuple[Dict[str, Trial], Dict[str, List[dict]]]:
        """Tune every arm, then train it with every seed: trials, and results by arm."""
        trials = {arm: self.tune(arm) for arm in self.arms}
        results: Dict[str, List[dict]] = {arm: [] for arm in self.arms}
        for seed in self.seeds:
            for arm in self.arms:
                results[arm].append(self.run(arm, trials[arm], seed))
        return trials, results


START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f}s] {text}", flush=True)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".study"), help="runs and report; kept and reused")
    parser.add_argument("--quick", action="store_true", help="fewer arms, seeds and steps: under an hour")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than the design's, to see whether it repeats")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"{BASELINE}, and these alone")
    options = parser.parse_args(given)
    import torch

    exit_on_signals()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(folder, options.quick, device, options.seeds, options.arms)
    try:
        with locked(folder, "study.py"):
            study.prepare()
            trials, results = study.judge()
            probes = json.loads((study.world / "probe.json").read_text())
            tables = {name: arm.table for name, arm in study.arms.items()}
            report = study_report.report(study.design, study.seeds, trials, results, tables, BASELINE, probes, device)
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
