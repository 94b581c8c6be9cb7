"""What wakes the fuser on a real tower: small readers trained on cached maps of DINOv2 ViT-S/14.

    python scripts/readouts.py --wheels .test/wheels            (pip install onnx scikit-learn scikit-image matplotlib)

Needs the package, but no LLaVA. Takes about 15 CPU minutes; what is there already is kept, so that the same command
goes on. Written before the runs, and committed before them:

World. `toy.dinov2` at 112 pixels, 8 x 8 cells, hidden_states 3, 5, 7, 9 and 11, which LLaVA takes alone. `toy.scenes`:
photographs from which every split has other columns, and nine items of one cell each, handwritten digits, printed
letters, one to five dots, tinted discs; 2,000 pictures to train, 500 held out. Of each picture eleven questions: what
is in each of the nine cells, whose kind is known, which photograph is on the left, and whether it is that on the right.

Reader. LLaVA's `mlp2x_gelu`, 384 -> 128, and behind it in place of a language model two blocks of cross-attention that
start by looking at the cell asked for. Both are trained from scratch, so this is a fresh projector: nothing here speaks
of a released LLaVA. 400 steps of 8 pictures, AdamW, no decay, cosine with 3 % warm-up, gradients cut at norm 1; MLP and
fuser at 1e-3 unless the arm says otherwise, reader at 2e-3. Four heads, two points. "At their own rate" is what
`opening_rate` gives such a run, 1.5e-2. Reader, steps and rates were tried with seed 100 on pictures of the validation
split, by few runs; rates are not tuned equally. All arms below are reported, and none is chosen afterwards.

Seeds 1, 2 and 3 draw the weights of MLP, fuser and reader, and the order of the pictures; pictures stay the same.

Read. Primary: percent right of digits, letters and dots together, held-out, arm less "query alone", paired; an arm is
awake if its interval lies above 0. Secondary: less channel_concat; each kind of question; scene (photograph and same),
which should not fall. Intervals cover seeds and pictures (`study_report.interval`).
Expected: at 1e-3 the block as published wakes in part, and at 1e-2 it sleeps; gates at a rate of their own wake it
further; columns at theirs and an open start reach channel_concat, and so does the best single layer.

Added when the eleven arms before them had been read: the last two, which tell the first look apart from the output.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from study_report import interval
from torch import nn
from toy import dinov2, scenes

from llava_mmfuser.block.deformable import NEAR
from llava_mmfuser.config import MMFuserConfig
from llava_mmfuser.hooks.optimizer import INHERIT, regroup, set_opening_rate
from llava_mmfuser.projector import MMFuserProjector

LAYERS, WIDTH, OUT, HEADS = (3, 5, 7, 9, 11), 384, 128, 4
COUNTS = {"train": 2000, "heldout": 500}
STEPS, BATCH, WARM_UP, RATE, READER_RATE = 400, 8, 0.03, 1e-3, 2e-3
DETAIL, SCENE = ("digit", "letter", "dots"), ("photo", "same")
SIDE = scenes.SIDE // scenes.PATCH


class Arm(NamedTuple):
    settings: Dict[str, Any]  # of the fuser; `alone` for one layer without any
    lr: float = RATE
    gate_lr: Any = INHERIT  # None: `opening_rate`, which is what a run gets without a flag
    unit: Optional[float] = None  # of the ring that deformable attention starts at, if not that of its settings


def mmfuser(lr: float = RATE, gate_lr: Any = INHERIT, unit: Optional[float] = None, **settings: Any) -> Arm:
    return Arm(dict(num_heads=HEADS, num_points=2, **settings), lr, gate_lr, unit)


ARMS = {
    "query alone (`mlp2x_gelu`)": Arm({"alone": 11}),
    "hidden_states[5] alone, LayerNorm": Arm({"alone": 5}),
    "channel_concat, one rate": Arm({"fusion": "channel_concat"}),
    "channel_concat": Arm({"fusion": "channel_concat"}, gate_lr=None),
    "mmfuser as published, 1e-3": mmfuser(),
    "mmfuser as published, 1e-2": mmfuser(lr=1e-2),
    "mmfuser, gates at their own rate": mmfuser(gate_lr=None),
    "mmfuser, gates at 4e-2": mmfuser(gate_lr=4e-2),
    "columns, one rate": mmfuser(output="columns"),
    "columns at their own rate": mmfuser(output="columns", gate_lr=None),
    "open start": mmfuser(start="open"),
    "mmfuser, gates at their own rate, own cell": mmfuser(gate_lr=None, unit=NEAR),
    "columns at their own rate, published ring": mmfuser(output="columns", gate_lr=None, unit=1.0),
}
BASELINE, RIVAL = "query alone (`mlp2x_gelu`)", "channel_concat"


class Alone(nn.Module):
    """One of the layers in front of LLaVA's projector; other layers than LLaVA's own are normalised."""

    def __init__(self, layer: int, projector: nn.Module):
        super().__init__()
        self.index, self.projector = LAYERS.index(layer), projector
        self.norm = nn.Identity() if layer == LAYERS[-1] else nn.LayerNorm(WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(self.norm(features.unflatten(-1, (len(LAYERS), WIDTH))[..., self.index, :]))


class Reader(nn.Module):
    """Answers all questions of a picture from its projected patches: [B, N, OUT] to logits [B, questions, answers]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = list(scenes.KINDS.values())
        self.starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        self.allowed = torch.full((len(sizes), sum(sizes)), -1e4)  # a question knows which kind of answer it wants
        for row, start, size in zip(self.allowed, self.starts, sizes):
            row[start : start + size] = 0
        self.cells = torch.tensor([row * SIDE + column for row, column in scenes.PLACES])
        self.place = nn.Parameter(torch.randn(SIDE * SIDE, OUT))
        self.kind = nn.Parameter(torch.randn(len(sizes), OUT) / 4)
        self.seen = nn.LayerNorm(OUT)
        self.norms = nn.ModuleList(nn.LayerNorm(OUT) for _ in range(5))
        self.attention = nn.ModuleList(nn.MultiheadAttention(OUT, 4, batch_first=True) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(OUT, 2 * OUT), nn.GELU(), nn.Linear(2 * OUT, OUT)) for _ in range(2)
        )
        self.out = nn.Linear(OUT, sum(sizes))
        with torch.no_grad():  # keys as queries: four fifths of the first look are at the cell asked for
            weight = self.attention[0].in_proj_weight
            weight[:OUT] *= 1.6
            weight[OUT : 2 * OUT] = weight[:OUT]

    def forward(self, tokens: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        tokens = self.seen(tokens)
        keys = tokens + self.place
        state = self.kind[kinds] + F.pad(self.place[self.cells], (0, 0, 0, len(scenes.SCENES)))
        for index, (attend, mlp) in enumerate(zip(self.attention, self.mlps)):
            state = state + attend(self.norms[2 * index](state), keys, tokens, need_weights=False)[0]
            state = state + mlp(self.norms[2 * index + 1](state))
        return self.out(self.norms[4](state)) + self.allowed[kinds]


def load(folder: Path, split: str) -> Dict[str, torch.Tensor]:
    return torch.load(folder / f"{split}.pt", mmap=True)


def prepare(folder: Path, wheels: Path) -> None:
    """The tower, and of every split maps, kinds and answers, and in what a linear probe needs, all layers' items."""
    tower = folder / "dinov2-112"
    if not tower.exists():
        dinov2.make_dinov2(tower, wheels, scenes.SIDE)
    for split, count in COUNTS.items():
        if not (folder / f"{split}.pt").exists():
            pictures, kinds, answers = scenes.make_scenes(split, count, seed=0)
            maps = scenes.make_maps(tower, pictures, LAYERS)
            torch.save(dict(maps=maps, kinds=kinds, answers=answers), folder / "incomplete.pt")
            (folder / "incomplete.pt").rename(folder / f"{split}.pt")


def part_of_rate(step: int) -> float:
    """Cosine with warm-up."""
    return min(1.0, (step + 1) / (STEPS * WARM_UP)) * (1 + np.cos(np.pi * step / STEPS)) / 2


def train(folder: Path, name: str, seed: int) -> None:
    """Train and read one arm with one seed; write what came out."""
    file = folder / "runs" / f"{list(ARMS).index(name):02d}-seed{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    arm, data, started = ARMS[name], load(folder, "train"), time.process_time()
    mlp, reader = nn.Sequential(nn.Linear(WIDTH, OUT), nn.GELU(), nn.Linear(OUT, OUT)), Reader()
    if "alone" in arm.settings:
        projector: nn.Module = Alone(arm.settings["alone"], mlp)
    else:
        projector = MMFuserProjector.build(MMFuserConfig(layers=LAYERS, **arm.settings), WIDTH, mlp)
    groups = [
        dict(params=list(projector.parameters()), lr=RATE),
        dict(params=list(reader.parameters()), lr=READER_RATE),
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    fused = isinstance(projector, MMFuserProjector)
    if fused:
        regroup(optimizer, projector.fuser, arm.lr, arm.gate_lr)
        projector.gate_lr = arm.gate_lr
    if arm.unit is not None:
        offsets = projector.fuser.cross_attn.sampling_offsets
        offsets.unit = arm.unit
        offsets.reset_parameters()

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, part_of_rate)
    if fused:
        set_opening_rate(scheduler, projector, STEPS)
    rates = sorted({group["initial_lr"] for group in optimizer.param_groups})
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    order: List[int] = []
    losses = []
    for _ in range(STEPS):
        order = order if len(order) >= BATCH else torch.randperm(COUNTS["train"], generator=generator).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        kinds, answers = data["kinds"][rows], data["answers"][rows]
        logits = reader(projector(data["maps"][rows].float()), kinds)
        loss = F.cross_entropy(logits.flatten(0, 1), (answers + reader.starts[kinds]).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    seconds = time.process_time() - started
    right = answered(projector, reader, load(folder, "heldout"))
    gate = projector.fuser.gate() if fused else None
    found = dict(arm=name, seed=seed, seconds=seconds, rates=rates, right=right.tolist())
    found["losses"] = [float(np.mean(losses[at : at + 50])) for at in range(0, STEPS, 50)]
    found["gate"] = None if gate is None else gate.detach().abs().mean().item()
    incomplete = file.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(found))
    incomplete.rename(file)
    print(f"seed {seed}: {name}: loss {found['losses'][-1]:.3f}, {seconds:.0f} s", flush=True)


@torch.no_grad()
def answered(projector: nn.Module, reader: Reader, data: Dict[str, torch.Tensor]) -> torch.Tensor:
    """Which questions are answered right: [pictures, questions]."""
    found = []
    for rows in torch.arange(len(data["maps"])).split(50):
        kinds = data["kinds"][rows]
        answers = reader(projector(data["maps"][rows].float()), kinds).argmax(-1) - reader.starts[kinds]
        found.append(answers.eq(data["answers"][rows]))
    return torch.cat(found).int()


def premise(folder: Path) -> List[str]:
    """What ridge regression reads of items from their cell's patch in each layer: rows of a table."""
    sets = {split: load(folder, split) for split in COUNTS}
    cells = torch.tensor([row * SIDE + column for row, column in scenes.PLACES])
    lines = ["| from one patch of hidden_states | chance | " + " | ".join(map(str, LAYERS)) + " |", "|---" * 7 + "|"]
    for index, (kind, count) in enumerate(scenes.ITEMS.items()):
        cell = []
        for layer in range(len(LAYERS)):
            part = slice(layer * WIDTH, (layer + 1) * WIDTH)
            x, y = {}, {}
            for split, data in sets.items():
                rows = data["kinds"][:, : len(cells)] == index
                x[split] = data["maps"][:, cells, part][rows].float()
                y[split] = data["answers"][:, : len(cells)][rows]
            mean, deviation = x["train"].mean(0), x["train"].std(0) + 1e-5
            x = {split: (value - mean) / deviation for split, value in x.items()}
            targets = F.one_hot(y["train"], count).float()
            normal = x["train"].T @ x["train"] + 10 * torch.eye(WIDTH)
            weights = torch.linalg.solve(normal, x["train"].T @ (targets - targets.mean(0)))
            guessed = (x["heldout"] @ weights + targets.mean(0)).argmax(1)
            cell.append(f"{100 * guessed.eq(y['heldout']).float().mean():.0f}")
        lines.append(f"| {kind} | {100 / count:.0f} | " + " | ".join(cell) + " |")
    return lines


def report(folder: Path, seeds: Sequence[int]) -> str:
    """Markdown: the premise, and per arm each kind of question, detail, both differences, scene, gates, seconds."""
    kinds, names = load(folder, "heldout")["kinds"], list(scenes.KINDS)
    runs: Dict[str, List[dict]] = {name: [] for name in ARMS}
    for index, name in enumerate(ARMS):
        runs[name] = [json.loads((folder / "runs" / f"{index:02d}-seed{s}.json").read_text()) for s in seeds]

    def share(name: str, wanted: Sequence[str]) -> np.ndarray:
        """[seeds, pictures]: of the questions of these kinds; a picture that has none counts as the mean."""
        asked = sum(kinds == names.index(kind) for kind in wanted).numpy() > 0
        right = np.array([run["right"] for run in runs[name]])
        with np.errstate(invalid="ignore"):
            values = (right * asked).sum(-1) / asked.sum(-1)
        return np.where(asked.any(-1), values, (right * asked).sum() / asked.sum() / len(right))

    def cell(values: np.ndarray, sign: str = "") -> str:
        mean, half = (100 * value for value in interval(values))
        return f"{mean:{sign}.0f} ± {half:.0f}"

    lines = [*premise(folder), ""]
    columns = ["arm", *names, "detail", "less query alone", "less channel_concat", "scene", "mean gate"]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|---" * 12 + "|")
    for name, found in runs.items():
        each = [f"{100 * share(name, [kind]).mean():.0f}" for kind in names]
        detail, gate = share(name, DETAIL), [run["gate"] for run in found]
        against = ["" if name == other else cell(detail - share(other, DETAIL), "+") for other in (BASELINE, RIVAL)]
        opened = "" if gate[0] is None else f"{np.mean(gate):.2g}"
        lines.append("| " + " | ".join([name, *each, cell(detail), *against, cell(share(name, SCENE)), opened]) + " |")
    return "\n".join(lines)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".study/readouts"), help="maps and runs; kept and reused")
    parser.add_argument("--wheels", type=Path, required=True, help="folder for the tower's wheel, see toy/dinov2.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args(given)
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    (options.output / "runs").mkdir(parents=True, exist_ok=True)
    try:
        prepare(options.output, options.wheels)
    except ValueError as error:
        print(f"readouts: {error}", file=sys.stderr)
        return 1
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(train, options.output, name, seed) for seed in options.seeds for name in ARMS]:
            done.result()
    print(report(options.output, options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
