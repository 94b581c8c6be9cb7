"""The study's report: shares with intervals, paired differences to the baseline, gates, cost; the paper's tables."""

from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np

DRAWS = 4000
KINDS = ("number", "place", "light")
Interval = Tuple[float, float, float]  # mean, and the 95 % interval around it


def correctness(results: Sequence[dict], kind: str) -> np.ndarray:
    """[seeds, questions] of 0 and 1 on the held-out pictures; kind "all" is every question of every kind."""
    kinds = KINDS if kind == "all" else (kind,)
    return np.array([[right for name in kinds for right in result["right"]["heldout"][name]] for result in results])


def bootstrap(values: np.ndarray) -> Interval:
    """Mean of [seeds, questions] and its 95 % interval: seeds and questions are both drawn anew, with replacement."""
    random = np.random.RandomState(0)
    seeds, questions = values.shape
    means = [
        values[random.randint(seeds, size=seeds)].mean(0)[random.randint(questions, size=questions)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def difference(results: Sequence[dict], baseline: Sequence[dict], kind: str) -> Interval:
    """The same of the difference to the baseline, question by question, seed by seed."""
    return bootstrap(correctness(results, kind) - correctness(baseline, kind))


def _cell(interval: Interval, sign: str = "") -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def steps_to(results: Sequence[dict], threshold: float, window: int = 20) -> str:
    """The mean step of stage 2 at which the smoothed loss falls below `threshold`, over the seeds where it does."""
    found = []
    for result in results:
        smooth = np.convolve(result["losses"][1], np.ones(window) / window, "valid")
        below = np.flatnonzero(smooth < threshold)
        found += [below[0] + window] if len(below) else []
    return f"{np.mean(found):.0f} ({len(found)}/{len(results)})" if found else f"never (0/{len(results)})"


def report(
    design: dict,
    seeds: Sequence[int],
    trials: Dict[str, Tuple[float, int]],
    results: Dict[str, List[dict]],
    tables: Dict[str, str],
    baseline: str,
    probes: List[Dict[str, float]],
    device: str,
) -> str:
    """Markdown: the premise, one table per group of arms, cost.

    Args:
        design: `trials`, `steps`.
        seeds: of the final runs.
        trials: the tuned learning rate of every arm, and how many times higher that of its own weights is.
        results: one record per seed of every arm.
        tables: the table that an arm belongs to; the baseline is repeated on top of each.
        baseline: its name.
        probes: of `toy.probe`.
        device: what the runs were made on.
    """
    steps = " + ".join(str(count) for count in design["steps"].values())
    lines = [
        f"{len(results)} arms, {len(seeds)} seeds ({', '.join(map(str, seeds))}), {steps} steps, rates tuned among "
        f"{', '.join(f'{rate:g} x {times}' for rate, times in design['trials'])} on validation pictures, on {device}. "
        f"{correctness(results[baseline], 'number').shape[1]} held-out pictures. Percent right, with 95 % intervals "
        "over seeds and questions; differences are paired.",
        "",
        "**Premise** (percent that a linear probe reads from one patch of each map)",
        "",
        "| | " + " | ".join(str(layer) for layer in range(len(probes))) + " |",
        "|---|" + "---|" * len(probes),
    ]
    for kind in KINDS:
        lines.append(f"| {kind} | " + " | ".join(f"{100 * layer[kind]:.0f}" for layer in probes) + " |")
    for table in dict.fromkeys(tables.values()):
        lines += ["", f"**{table[0].upper()}{table[1:]}**", ""]
        lines.append(f"| arm | number | place | light | all | number, less {baseline} | all, less {baseline} |")
        lines.append("|---|---|---|---|---|---|---|")
        for arm in dict.fromkeys([baseline, *(name for name in results if tables[name] == table)]):
            cells = [_cell(bootstrap(correctness(results[arm], kind))) for kind in (*KINDS, "all")]
            compared = [_cell(difference(results[arm], results[baseline], k), "+") for k in ("number", "all")]
            lines.append(" | ".join([f"| {arm}", *cells, *(compared if arm != baseline else ["", ""])]) + " |")
    lines += ["", "**Cost and training**", ""]
    lines.append("| arm | rate | projector | seconds to train | last loss | steps to loss 0.4 | cross gate |")
    lines.append("|---|---|---|---|---|---|---|")
    for arm, found in results.items():
        gates = [result["gates"][1][-1] for result in found if result["gates"][1]]
        lines.append(
            f"| {arm} | {trials[arm][0]:g} x {trials[arm][1]} | {found[0]['parameters']:,} "
            f"| {np.mean([result['seconds'] for result in found]):.0f} "
            f"| {np.mean([np.mean(result['losses'][1][-20:]) for result in found]):.3f} "
            f"| {steps_to(found, 0.4)} | {f'{np.mean(gates):.3f}' if gates else ''} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: Dict[str, List[dict]], file: Path, window: int = 20) -> None:
    """The smoothed losses of both stages, one line per arm: the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for stage, (axis, title) in enumerate(zip(axes, ("pretrain", "finetune"))):
        for index, (arm, found) in enumerate(results.items()):
            curve = np.mean([result["losses"][stage] for result in found], axis=0)
            smooth = np.convolve(curve, np.ones(min(window, len(curve))) / min(window, len(curve)), "valid")
            style = "-" if index < 10 else "--"
            axis.plot(np.arange(len(smooth)) + window, smooth, style, color=f"C{index % 10}", label=arm)
        axis.set(title=f"{title} loss, mean of {window} steps and all seeds", xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[1].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
