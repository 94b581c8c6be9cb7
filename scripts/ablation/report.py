"""What an ablation found: the spread over seeds, differences to the baseline, a table and a plot."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from housekeeping import padded, write

PANELS_PER_ROW = 4


def metric_names(records: Sequence[dict]) -> List[str]:
    """Every metric of the finished runs, in the order of appearance."""
    return list(dict.fromkeys(name for record in finished(records) for name in record["metrics"]))


def finished(records: Sequence[dict]) -> List[dict]:
    return [record for record in records if record["status"] == "done"]


def summarise(records: Sequence[dict], settings: Sequence[str], metrics: Sequence[str]) -> List[dict]:
    """Per metric and setting: n, mean and sample standard deviation, and those two of the difference to the baseline.

    `seconds` is a metric, too. The baseline is the first setting. Differences are taken seed by seed, over the seeds
    that both sides finished, so that a missing seed cannot pass for an effect. What cannot be computed is None.
    """
    rows = []
    for metric in metrics:
        values: Dict[str, Dict[int, float]] = {setting: {} for setting in settings}
        for record in finished(records):
            found = {"seconds": record["seconds"], **record["metrics"]}
            if metric in found:
                values[record["setting"]][record["seed"]] = found[metric]
        baseline = values[settings[0]]
        for setting in settings:
            own = values[setting]
            differences = [own[seed] - baseline[seed] for seed in own if seed in baseline]
            compared = setting != settings[0] and differences
            rows.append(
                {
                    "metric": metric,
                    "setting": setting,
                    "n": len(own),
                    "mean": _mean(list(own.values())),
                    "deviation": _deviation(list(own.values())),
                    "difference": _mean(differences) if compared else None,
                    "difference_deviation": _deviation(differences) if compared else None,
                    "values": {str(seed): value for seed, value in sorted(own.items())},
                }
            )
    return rows


def _mean(values: Sequence[float]) -> Optional[float]:
    return sum(values) / len(values) if values else None


def _deviation(values: Sequence[float]) -> Optional[float]:
    """The sample standard deviation (n - 1); a NaN or an infinity among the values makes it NaN."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def table(rows: Sequence[dict], records: Sequence[dict], settings: Sequence[str]) -> str:
    """One block per metric, one line per setting; what failed and what is missing below."""
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        block = [row for row in rows if row["metric"] == metric]
        decimals = 1 if metric == "seconds" else _decimals([row["mean"] for row in block])
        cells = [[metric, "n", "mean ± sd", f"difference to {settings[0]}"]]
        for row in block:
            mean = _spread(row["mean"], row["deviation"], decimals)
            difference = _spread(row["difference"], row["difference_deviation"], decimals, sign="+")
            cells.append([row["setting"], str(row["n"]), mean, difference])
        lines += [*padded(cells), ""]
    lines.append("sd: sample standard deviation over seeds; differences are taken seed by seed.")
    changed = sorted(
        {
            f"{package} ({', '.join(sorted(found))})"
            for package in {package for record in finished(records) for package in record["versions"]}
            for found in [{record["versions"].get(package, "none") for record in finished(records)}]
            if len(found) > 1
        }
    )
    if changed:
        lines.append(f"Careful: these runs were made with different versions of {', '.join(changed)}.")
    lines += [
        f"Failed: {record['setting']}, seed {record['seed']}: {record['problem']}; {record['log']}"
        for record in records
        if record["status"] == "failed"
    ]
    missing = sum(record["status"] not in ("done", "failed") for record in records)
    if missing:
        lines.append(f"Not run yet: {missing} of {len(records)}.")
    return "\n".join(lines)


def _decimals(values: Sequence[Optional[float]]) -> int:
    """Enough decimals for four digits of the largest value, and at least one."""
    largest = max((abs(value) for value in values if value and math.isfinite(value)), default=1.0)
    return max(1, 3 - math.floor(math.log10(largest)))


def _spread(mean: Optional[float], deviation: Optional[float], decimals: int, sign: str = "") -> str:
    if mean is None:
        return ""
    text = f"{mean:{sign}.{decimals}f}"
    return text if deviation is None else f"{text} ± {deviation:.{decimals}f}"


def runs_csv(records: Sequence[dict], metrics: Sequence[str]) -> str:
    """One line per run, for a spreadsheet or pandas; a metric that a run does not have is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "seed", "status", "seconds", *metrics])
    for record in records:
        found = record.get("metrics", {})
        writer.writerow(
            [
                record["setting"],
                record["seed"],
                record["status"],
                record.get("seconds", ""),
                *(found.get(metric, "") for metric in metrics),
            ]
        )
    return text.getvalue()


def draw(rows: Sequence[dict], settings: Sequence[str], file: Path) -> None:
    """One panel per metric: a point per seed, the mean with its standard deviation, the baseline's mean dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    columns = min(len(metrics), PANELS_PER_ROW)
    lines = math.ceil(len(metrics) / columns)
    names = [setting.replace("+", "\n") if "=" in setting else setting for setting in settings]
    margin = 0.3 + 0.085 * max(len(part) for name in names for part in name.split("\n"))
    pitch = 0.34 + 0.15 * max(name.count("\n") for name in names)
    panel = max(pitch * len(settings), 0.9)
    width, height = margin + (2.9 * columns if columns > 1 else 4.5) + 0.15, 0.25 + lines * (panel + 0.75)
    figure, axes = plt.subplots(lines, columns, sharey=True, squeeze=False, figsize=(width, height))
    figure.subplots_adjust(
        left=margin / width,
        right=1 - 0.15 / width,
        top=1 - 0.4 / height,
        bottom=0.6 / height,
        hspace=0.75 / panel,
        wspace=0.12,
    )
    for axis, metric in zip(axes.flat, metrics):
        _panel(axis, metric, [row for row in rows if row["metric"] == metric])
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(settings)), names)
        axis.set_ylim(len(settings) - 0.5, -0.5)  # the baseline on top
    for axis in list(axes.flat)[len(metrics) :]:
        axis.remove()
    seeds = max(row["n"] for row in rows)
    caption = "one seed" if seeds == 1 else f"circles: {seeds} seeds; diamonds: mean ± sample standard deviation"
    caption += "; dashed: the first setting's mean"
    figure.text(0.15 / width, 0.1 / height, caption, fontsize=8, color="0.35", va="bottom")
    incomplete = file.with_name(file.name + ".incomplete")
    figure.savefig(incomplete, dpi=150, format="png")
    plt.close(figure)
    incomplete.replace(file)


def _panel(axis, metric: str, block: Sequence[dict]) -> None:
    axis.set_title(metric, fontsize=10)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    for position, row in enumerate(block):
        if position % 2 == 0:
            axis.axhspan(position - 0.5, position + 0.5, color="0.965", zorder=0, linewidth=0)
        colour = "0.35" if position == 0 else "tab:blue"
        values = list(row["values"].values())
        heights = [position + 0.5 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
        axis.scatter(values, heights, s=22, facecolors="none", edgecolors=colour, linewidths=0.9, alpha=0.75, zorder=3)
        if row["mean"] is None:
            place = dict(transform=axis.get_yaxis_transform(), ha="center", va="center")
            axis.text(0.5, position, "no finished run", fontsize=8, color="0.5", **place)
            continue
        look = dict(fmt="D", markersize=5, color=colour, capsize=3, linewidth=1.4, zorder=4)
        axis.errorbar(row["mean"], position, xerr=row["deviation"], **look)
        if position == 0:
            axis.axvline(row["mean"], color="0.35", linestyle="--", linewidth=0.9, zorder=1)
    if all(not value for row in block for value in row["values"].values()):
        axis.set_xlim(-1.1, 1.1)  # nothing but zeros: matplotlib would show 1e-17
    axis.ticklabel_format(axis="x", useOffset=False)
    axis.xaxis.get_offset_text().set_fontsize(8)
    axis.locator_params(axis="x", nbins=4)


def write_report(
    folder: Path, records: Sequence[dict], settings: Dict[str, Sequence[str]], wanted: Optional[Sequence[str]]
) -> str:
    """Write results.json, results.csv, table.txt and, once there is a result, ablation.png; return the table."""
    metrics = metric_names(records) if wanted is None else list(wanted)
    rows = summarise(records, list(settings), [*metrics, "seconds"])
    text = table(rows, records, list(settings))
    write(folder / "table.txt", text + "\n")
    write(folder / "results.csv", runs_csv(records, metrics))
    flags = {name: list(value) for name, value in settings.items()}
    results = {"baseline": next(iter(settings)), "settings": flags, "summary": rows, "runs": list(records)}
    write(folder / "results.json", json.dumps(results, indent=1))
    drawn = [row for row in rows if row["metric"] in metrics]
    if any(row["n"] for row in drawn):
        draw(drawn, list(settings), folder / "ablation.png")
    return text
