"""Mean and spread over seeds of your own runs, and what each setting differs by from the first.

  compare.py SETTING …        folders SETTING-seed0, SETTING-seed1, … that train.py wrote

Metrics are the mean of the last ten losses in trainer_state.json and the numbers of a metrics.json beside it,
{"name": 1.5, …}. Differences are taken seed by seed, so that a missing seed cannot pass for an effect.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Sequence

from housekeeping import padded

Seeds = Dict[str, Dict[str, float]]  # seed -> metric -> value


def read(setting: str) -> Seeds:
    """The metrics of every seed. Raises ValueError where there is no run, or one without metrics."""
    path, found = Path(setting), {}
    for folder in sorted(path.parent.glob(f"{path.name}-seed*")):
        metrics, own, state = {}, folder / "metrics.json", folder / "trainer_state.json"
        if state.exists():
            losses = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
            metrics.update({"loss": statistics.fmean(losses[-10:])} if losses else {})
        if own.exists():
            metrics.update(json.loads(own.read_text()))
        if not metrics or not all(type(value) in (int, float) for value in metrics.values()):
            raise ValueError(f"{folder} holds no loss in trainer_state.json and no numbers in metrics.json")
        found[folder.name[len(path.name) :]] = metrics
    if not found:
        raise ValueError(f"{setting}: there is no folder {setting}-seed0 or of another seed")
    return found


def table(settings: Dict[str, Seeds]) -> str:
    """One block per metric, one line per setting."""
    baseline, lines = next(iter(settings)), []
    for metric in dict.fromkeys(name for seeds in settings.values() for found in seeds.values() for name in found):
        rows = [[metric, "n", "mean ± sd", f"difference to {baseline}"]]
        first = {seed: found[metric] for seed, found in settings[baseline].items() if metric in found}
        for setting, seeds in settings.items():
            own = {seed: found[metric] for seed, found in seeds.items() if metric in found}
            paired = [value - first[seed] for seed, value in own.items() if seed in first and setting != baseline]
            rows.append([setting, str(len(own)), _spread(list(own.values())), _spread(paired, "+")])
        lines += [*padded(rows), ""]
    return "\n".join([*lines, "sd: sample standard deviation over seeds; differences are taken seed by seed."])


def _spread(values: List[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.4g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4g}{spread}" if values else ""


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", metavar="SETTING", nargs="+", help="the first is the baseline")
    try:
        print(table({setting: read(setting) for setting in parser.parse_args(given).settings}))
    except ValueError as error:
        parser.exit(2, f"compare.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
