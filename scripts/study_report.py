"""The study's report: shares with intervals, paired differences to the baseline, gates, cost; the paper's tables."""

from pathlib import Path
from typing import Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
from scipy import stats
from toy.pictures import QUESTIONS

KINDS = tuple(QUESTIONS)
ASKED = (*KINDS, "all")
BASELINE = "query alone"
Interval = Tuple[float, float]  # mean, and half the width of the 95 % interval around it


class Arm(NamedTuple):
    """A row in tables of the report. `quick` arms are those of --quick; differences are to the arm `against`."""

    tables: Tuple[str, ...]
    flags: str
    quick: bool = True
    against: str = BASELINE


def share(details: dict, kind: str, split: str = "heldout") -> float:
    """Of right answers to questions of this kind, or "all"."""
    return float(correctness([details], kind, split).mean())


def correctness(results: Sequence[dict], kind: str, split: str = "heldout") -> np.ndarray:
    """[seeds, pictures], 0 or 1; kind "all" is the mean over a picture's questions, which share its difficulty."""
    kinds = KINDS if kind == "all" else (kind,)
    return np.array([np.mean([details["right"][split][name] for name in kinds], axis=0) for details in results])


def interval(values: np.ndarray) -> Interval:
    """Mean of [seeds, pictures], and half of its 95 % interval for other seeds and other pictures.

    Seeds and pictures are crossed: the variances of both means add up, and Student's t has the degrees of freedom that
    Satterthwaite's approximation gives such a sum; a percentile bootstrap has no such allowance for few seeds.
    """
    if len(values) == 1:
        return float(values.mean()), np.nan
    parts = np.array([means.var(ddof=1) / len(means) for means in (values.mean(1), values.mean(0))])
    freedom = parts.sum() ** 2 / (parts**2 / (np.array(values.shape) - 1)).sum() if parts.any() else 1.0
    return float(values.mean()), float(stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum()))


def difference(results: Sequence[dict], others: Sequence[dict], kind: str) -> Interval:
    """The same of the difference to `others`, picture by picture, seed by seed."""
    return interval(correctness(results, kind) - correctness(others, kind))


def premise(probes: Sequence[Dict[str, float]]) -> str:
    """Whether the tower lost the number and kept the light, in one sentence."""
    lost = {kind: 100 * (max(layer[kind] for layer in probes) - probes[-1][kind]) for kind in ("number", "light")}
    holds = lost["number"] >= 15 and lost["light"] < 15
    return (
        f"Towards LLaVA's map, the last, the number falls by {lost['number']:.0f} points and the light by "
        f"{lost['light']:.0f}: the premise {'holds' if holds else 'does not hold, so that the rest says little'}."
    )


def _cell(found: Interval, sign: str = "") -> str:
    mean, half = (100 * value for value in found)
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if np.isfinite(half) else "")


def steps_to(results: Sequence[dict], threshold: float, window: int = 20) -> str:
    """The mean step of stage 2 at which the smoothed loss falls below `threshold`, over the seeds where it does."""
    found = []
    for result in results:
        smooth = np.convolve(result["losses"]["finetune"], np.ones(window) / window, "valid")
        below = np.flatnonzero(smooth < threshold)
        found += [below[0] + window] if len(below) else []
    return f"{np.mean(found):.0f} ({len(found)}/{len(results)})" if found else f"never (0/{len(results)})"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> List[str]:
    return ["", title, "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]


def report(
    steps: Mapping[str, int],
    seeds: Sequence[int],
    offered: Sequence[Tuple[float, int]],
    trials: Mapping[str, Tuple[float, int]],
    results: Mapping[str, List[dict]],
    arms: Mapping[str, Arm],
    probes: Sequence[Dict[str, float]],
    device: str,
) -> str:
    """Markdown: the premise, one table per group of arms, cost.

    `steps` are those of both stages, `offered` all trials and `trials` the tuned ones, `results` a record per seed.
    """
    questions = len(next(iter(results.values()))[0]["right"]["heldout"]["number"])
    lines = [
        f"{len(results)} arms, {len(seeds)} seeds ({', '.join(map(str, seeds))}), "
        f"{' + '.join(str(count) for count in steps.values())} steps, rates tuned among "
        f"{', '.join(f'{rate:g} x {times}' for rate, times in offered)} on validation pictures, on {device}. "
        f"{questions} held-out pictures. Percent right ± half of the 95 % interval over seeds and pictures; "
        "differences are paired."
    ]
    lines += _table(
        "**Premise** (percent that a linear probe reads from one patch of each map)",
        ["", *map(str, range(len(probes)))],
        ([kind, *(f"{100 * layer[kind]:.0f}" for layer in probes)] for kind in KINDS),
    )
    lines += ["", premise(probes)]

    def differences(arm: str, other: str) -> List[str]:
        return [_cell(difference(results[arm], results[other], kind), "+") for kind in ASKED]

    for table in dict.fromkeys(table for arm in arms.values() for table in arm.tables):
        members = [name for name in results if table in arms[name].tables]
        baseline = arms[members[0]].against
        if not any(arms[name].tables[0] == table for name in members if name != baseline):
            continue  # few arms were run: nothing that other tables do not show
        rows = []
        for arm in dict.fromkeys([baseline, *members]):
            shares = [_cell(interval(correctness(results[arm], kind))) for kind in ASKED]
            rows.append([arm, *shares, *(differences(arm, baseline) if arm != baseline else [""] * len(ASKED))])
        title = f"**{table[0].upper()}{table[1:]}** (+: compared with {baseline})"
        lines += _table(title, ["arm", *ASKED, *(f"{kind} +" for kind in ASKED)], rows)
    if "mmfuser" in results:
        others = [arm for arm in results if arm != "mmfuser" and arms[arm].against == arms["mmfuser"].against]
        title = "**mmfuser compared with every other arm** (mmfuser's share less the arm's)"
        lines += _table(title, ["arm", *ASKED], ([arm, *differences("mmfuser", arm)] for arm in others))
    rows = []
    for arm, found in results.items():
        gates = [result["gates"]["finetune"][-1] for result in found if result["gates"]["finetune"]]
        seconds = np.median([result["seconds"] for result in found])
        loss = np.mean([np.mean(result["losses"]["finetune"][-20:]) for result in found])
        row = [arm, f"{trials[arm][0]:g} x {trials[arm][1]}", f"{found[0]['parameters']:,}", f"{seconds:.0f}"]
        rows.append([*row, f"{loss:.3f}", steps_to(found, 0.4), f"{np.mean(gates):.3f}" if gates else ""])
    head = "arm, rate, projector, seconds to train, last loss, steps to loss 0.4, cross gate"
    return "\n".join(lines + _table("**Cost and training**", head.split(", "), rows)) + "\n"


def draw(results: Mapping[str, List[dict]], file: Path, window: int = 20) -> None:
    """The smoothed losses of both stages, one line per arm: the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for stage, axis in zip(("pretrain", "finetune"), axes):
        for index, (arm, found) in enumerate(results.items()):
            if stage in found[0]["losses"]:  # a released checkpoint is not pretrained
                curve = np.mean([result["losses"][stage] for result in found], axis=0)
                smooth = np.convolve(curve, np.ones(min(window, len(curve))) / min(window, len(curve)), "valid")
                style = "-" if index < 10 else "--"
                axis.plot(np.arange(len(smooth)) + window, smooth, style, color=f"C{index % 10}", label=arm)
        axis.set(title=f"{stage} loss, mean of {window} steps and all seeds", xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
