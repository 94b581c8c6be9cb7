"""Scores a checkpoint by lmms-eval and prints one table beside the paper's row.

SUITE is one of those that --list prints, or any task, group or tag of lmms-eval. Suites stand right behind CKPT.
What is done is kept below --output per checkpoint, flags and versions, and the same command goes on. Flags that are not
named here go to lmms-eval as they are (--limit 100, --batch_size 8, --gen_kwargs …).
Exit code: 0 if everything asked for has a score, 1 if something is missing or failed, 2 for bad arguments.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from housekeeping import exit_on_signals, write

from evaluation import harness
from evaluation.paired import difference
from evaluation.suites import SUITES, Suite

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("--model", "--tasks", "--output_path", "--config", "--log_samples")
NO_DATA = (
    "data set {data} could not be read: {reason}. Get it once with network and HF_TOKEN set; it is kept below HF_HOME "
    "(here {home}), which you may copy, then with HF_DATASETS_OFFLINE=1; or give a task of your own that reads local "
    "files, by --include_path DIR"
)


class Row(NamedTuple):
    """What was asked: a suite, or a task of lmms-eval as a suite of its own."""

    key: str
    suite: Suite


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluate.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="folder, or name on the hub")
    parser.add_argument("suites", metavar="SUITE", nargs="*", help="default: the paper's fifteen")
    parser.add_argument("--against", metavar="CKPT2", help="score this one, too, and show the paired difference")
    parser.add_argument("--base", help="base model of what is only a part (adapter, LoRA): LLaVA's --model-base")
    parser.add_argument("--output", type=Path, default=Path("scores"), help="folder for results (default: scores)")
    parser.add_argument("--size", choices=("7b", "13b"), help="the paper's row (default: 13b if CKPT says so, else 7b)")
    parser.add_argument(
        "--model_args", default="", help="further ones for lmms-eval, such as conv_template=llava_llama_2"
    )
    parser.add_argument("--include_path", help="folder with tasks of your own, as lmms-eval's")
    parser.add_argument("--list", action="store_true", help="print the suites and their tasks")
    options, flags = parser.parse_known_args(argv)
    if options.list:
        print(listing())
        return 0
    exit_on_signals()
    try:
        return evaluate(options, flags)
    except ValueError as problem:
        parser.exit(2, f"evaluate.sh: {problem}\n")


def evaluate(options: argparse.Namespace, flags: List[str]) -> int:
    if options.checkpoint is None:
        raise ValueError("CKPT is missing; --help says more")
    if flags and not flags[0].startswith("-"):
        raise ValueError(f"{flags[0]} stands behind a flag; suites stand right behind CKPT")
    for flag in flags:
        if flag.split("=")[0] in OURS:
            raise ValueError(f"{flag} is set here; name suites or tasks behind CKPT, and see --output and --model_args")
    if options.include_path and not Path(options.include_path).is_dir():
        raise ValueError(f"--include_path is {options.include_path}: no such folder")
    models = [model(name, options.base) for name in (options.checkpoint, options.against) if name]
    if options.base and all(one.base is None for one in models):
        raise ValueError(f"--base is {options.base}, but {models[0].path} is a whole checkpoint; leave it out")
    asked = list(dict.fromkeys(options.suites)) or [key for key, suite in SUITES.items() if suite.paper]

    root = Path(os.environ.get("EVALUATE_ENV") or ROOT / ".evaluate")
    python = harness.environment(root.expanduser().absolute())
    tasks = [task for key in asked for task in (SUITES[key].tasks if key in SUITES else [key])]
    about = harness.describe(python, tasks, options.include_path)
    if about["unknown"]:
        raise ValueError("\n".join(unknown(about, name) for name in about["unknown"]))
    rows = [row for key in asked for row in rows_of(key, about)]

    tasks_of_own = Path(options.include_path) if options.include_path else None
    own = [harness.files(tasks_of_own, f"**/*.{end}") for end in ("yaml", "py")] if tasks_of_own else []
    folders = []
    for one in models:
        mark = one.identity(flags, options.model_args, own, about["versions"])
        folders.append(options.output / f"{one.name}-{mark}")
    passed = [*flags, *(["--include_path", options.include_path] if options.include_path else [])]
    results = []
    for row in rows:
        result = {"suite": row.key, "title": row.suite.title, "metric": row.suite.metric, "notes": []}
        results.append(result)
        lacks = [name for name in row.suite.needs if not (os.environ.get(name) or shutil.which(name))]
        if lacks:
            result["notes"] += [_lack(name) for name in lacks]
            continue
        for one, folder in zip(models, folders):
            for task in row.suite.tasks:
                target = folder / task
                if (target / "results.json").is_file():
                    print(f"== {one.name}: {task}: kept from an earlier run, {target}", flush=True)
                    continue
                print(f"== {one.name}: {task} (log: {target}.log)", flush=True)
                try:
                    harness.score(python, one, task, target, about["gpus"], options.model_args, passed)
                except ValueError as problem:
                    reason, data = str(problem), about["tasks"][task]["data"]
                    if reason.startswith("NO DATA: "):
                        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
                        reason = NO_DATA.format(data=data, reason=reason[len("NO DATA: ") :], home=home)
                    result["notes"].append(f"{one.name}: {task}: {reason}")
                    print(f"   failed: {reason}", flush=True)
        if not result["notes"]:
            fill(result, row, folders)
    size = options.size or ("13b" if "13b" in options.checkpoint.lower() else "7b")
    text = table(rows, results, [one.name for one in models], size, about["versions"])
    everything = {
        "checkpoint": models[0]._asdict(),
        "against": models[1]._asdict() if options.against else None,
        "flags": [*passed, *filter(None, [options.model_args])],
        "versions": about["versions"],
        "suites": results,
    }
    folders[0].mkdir(parents=True, exist_ok=True)
    for name, content in (("results.json", json.dumps(everything, indent=1)), ("results.txt", text + "\n")):
        write(folders[0] / name, content)
    print(f"\n{text}\n\n{folders[0] / 'results.json'}")
    return int(any("score" not in result for result in results))


def model(given: str, base: Optional[str]) -> harness.Model:
    """The checkpoint, looked at by `inspect`. Raises ValueError where it would not load."""
    folder = Path(given).expanduser()
    path = os.path.abspath(folder) if folder.is_dir() else given
    kind = "full checkpoint"
    if folder.is_dir():
        command = [sys.executable, "-m", "llava_mmfuser", "inspect", path]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        kind = "".join(re.findall(r"^type: (.*)", done.stdout, re.MULTILINE))
        if done.returncode:
            raise ValueError(f"{given} would not load, says python -m llava_mmfuser inspect:\n{done.stdout.strip()}")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) or folder.parent.is_dir():
        raise ValueError(f"CKPT is {given}: no such folder, and no name on the hub (owner/name); check the path")
    part = not kind.startswith("full")
    if part and not base:
        raise ValueError(f"{given} is only a part ({kind}): give the model that it belongs to by --base")
    *above, name = Path(path).parts
    if name.startswith("checkpoint-") and above:
        name = f"{above[-1]}_{name}"  # as LLaVA names it
    wanted = ["llava"] + ["lora"] * ("lora" in kind.lower())
    name = "-".join([word for word in wanted if word not in name.lower()] + [name])  # LLaVA goes by these words
    return harness.Model(path, (os.path.abspath(base) if Path(base).is_dir() else base) if part else None, name)


def rows_of(key: str, about: Dict) -> List[Row]:
    if key in SUITES:
        return [Row(key, SUITES[key])]
    return [Row(task, Suite(task, [task], scale=1.0)) for task in about["members"][key]]


def unknown(about: Dict, name: str) -> str:
    near = about["unknown"][name]
    return (
        f"unknown suite or task {name}. Suites: {', '.join(SUITES)}. Close tasks of lmms-eval's {about['count']}: "
        f"{', '.join(near) or 'none'}. Tasks of your own need --include_path DIR"
    )


def _lack(name: str) -> str:
    if name.isupper():
        return f"{name} is not set in the environment; a judge at OpenAI reads the answers"
    return f"the program {name} is not on PATH: install it (Debian: default-jre-headless)"


def fill(result: Dict, row: Row, folders: List[Path]) -> None:
    """Scores and their paired difference, from what lmms-eval left in `folders`."""
    tasks = row.suite.tasks
    found = [[harness.results(folder / task, task) for task in tasks] for folder in folders]
    metric = row.suite.metric or next(iter(found[0][0]), None)
    if metric is None or any(metric not in scores for part in found for scores in part):
        result["notes"].append(f"lmms-eval printed no number for {metric or 'any metric'}; see {folders[0] / tasks[0]}")
        return
    scores = [[scores[metric] for scores in part] for part in found]
    means = [row.suite.scale * sum(part) / len(part) for part in scores]
    result.update(metric=metric, score=means[0], tasks=dict(zip(tasks, found[0])))
    if len(folders) == 1:
        return
    result["against"] = means[1]
    answers = [[harness.answers(folder / task, task, metric) for task in tasks] for folder in folders]
    paired = difference(*answers, scores, row.suite.scale)
    if paired is None:
        result["notes"].append(f"{metric} is not a mean over questions: no paired difference")
    else:
        result["paired"] = paired._asdict()


def table(rows: List[Row], results: List[Dict], names: List[str], size: str, versions: Dict[str, str]) -> str:
    """One line per suite; marks and reasons below it."""
    paired = len(names) == 2
    head = ["suite", "metric", *names, *(["difference [95 %]", "questions"] if paired else [])]
    head += [f"LLaVA-1.5-{size.upper()}", "+ MMFuser"]
    lines, notes = [head], []
    marks: Dict[str, str] = {}
    for row, result in zip(rows, results):
        digits = 0 if row.suite.scale == 1000 else 3 if row.suite.scale == 1 and not row.suite.paper else 1
        cells = [f"{result[key]:.{digits}f}" if key in result else "–" for key in ("score", "against")[: len(names)]]
        if paired:
            cells += _paired_cells(result.get("paired"), digits)
        before, after = row.suite.paper.get(size, ("", ""))
        falls = " (falls)" if row.suite.paper and after < before else ""
        mark = marks.setdefault(row.suite.differs, str(len(marks) + 1)) if row.suite.differs else ""
        metric = (result["metric"] or "") + (f" [{mark}]" if mark else "")
        lines.append([row.suite.title, metric, *cells, f"{before:g}" if before else "", f"{after}{falls}"])
        notes += [f"{row.suite.title}: {note}" for note in result["notes"]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    text += [
        "",
        "The last two columns are the paper's (arXiv 2410.11829): not measured here, partly by other harnesses.",
    ]
    text += [f"[{mark}] {how}" for how, mark in marks.items()]
    if paired:
        text.append(f"Difference: {names[0]} less {names[1]}, question by question, and its bootstrap interval.")
    if any(not result["paired"]["additive"] for result in results if "paired" in result):
        text.append("* of the questions' scores, in percent: the metric itself is no mean over questions")
    return "\n".join(text + notes + [", ".join(f"{name} {version}" for name, version in versions.items())])


def _paired_cells(paired: Optional[Dict], digits: int) -> Tuple[str, str]:
    if paired is None:
        return "–", "–"
    values = [f"{paired[key]:+.{digits if paired['additive'] else 1}f}" for key in ("mean", "low", "high")]
    star = "" if paired["additive"] else " *"
    return f"{values[0]} [{values[1]}, {values[2]}]{star}", str(paired["questions"])


def listing() -> str:
    """Every suite with its tasks, what it needs beside them, and how its protocol differs from the paper's."""
    lines = []
    for key, suite in SUITES.items():
        lines.append(f"{key} ({suite.title}): {suite.metric} of {', '.join(suite.tasks)}")
        lines += [f"    needs {name}" for name in suite.needs] + [f"    {suite.differs}"] * bool(suite.differs)
    return "\n".join(lines + ["Any other task, group or tag of lmms-eval goes by its own name."])
