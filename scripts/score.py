"""Scores a checkpoint by lmms-eval and prints one table beside the paper's row.

SUITE is one of those that --list prints, or any task, group or tag of lmms-eval. Suites stand right behind CKPT.
What is done is kept below --output per checkpoint, flags and versions, and the same command goes on. Flags that are not
named here go to lmms-eval as they are (--limit 100, --batch_size 8, --gen_kwargs …).
Exit code: 0 if everything asked for has a score, 1 if something is missing or failed, 2 for bad arguments.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from evaluation import harness
from evaluation.paired import difference
from evaluation.suites import SUITES, Suite
from housekeeping import exit_on_signals, write

ROOT = Path(__file__).resolve().parent.parent
OURS = ("--model", "--tasks", "--output_path", "--config", "--log_samples")
PAIRED = ("difference [95 %]", "seen from", "McNemar p", "questions / pictures")  # columns
VERSIONS = ("llava-mmfuser", "llava-torch", "llava", "torch", "transformers", "pillow")


def main(argv: List[str]) -> int:
    look = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(prog="evaluate.sh", allow_abbrev=False, **look)
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="folder, or name on the hub")
    parser.add_argument("suites", metavar="SUITE", nargs="*", help="default: the paper's fifteen")
    parser.add_argument("--against", metavar="CKPT2", help="score this one, too, and show the paired difference")
    parser.add_argument("--base", help="base model of what is only a part (adapter, LoRA): LLaVA's --model-base")
    parser.add_argument("--output", type=Path, default=Path("scores"), help="folder for results (default: scores)")
    parser.add_argument("--size", choices=("7b", "13b"), help="the paper's row (default: 13b if CKPT says so, else 7b)")
    parser.add_argument("--model_args", default="", help="more for lmms-eval, such as conv_template=llava_llama_2")
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
    for part in (part for one in models for part in one if part and "," in part):
        raise ValueError(f"{part} has a comma, which lmms-eval's --model_args cannot take; make a link to it")
    if options.base and all(one.base is None for one in models):
        raise ValueError(f"--base is {options.base}, but {models[0].path} is a whole checkpoint; leave it out")
    asked = list(dict.fromkeys(options.suites)) or [key for key, suite in SUITES.items() if suite.paper]
    root = Path(os.environ.get("EVALUATE_ENV") or ROOT / ".evaluate")
    python = harness.environment(root.expanduser().absolute())  # says so if there is no torch

    import torch

    own = harness.installed()
    versions = {"python": platform.python_version(), "lmms-eval": harness.HARNESS.split("==")[1]}
    versions.update({name: own[name.replace("-", "_")] for name in VERSIONS if name.replace("-", "_") in own})
    if torch.cuda.is_available():
        versions["GPU"] = torch.cuda.get_device_name()
    passed = [*flags, *(["--include_path", options.include_path] if options.include_path else [])]
    kinds = ("**/*.yaml", "**/*.py") if options.include_path else ()
    files = [harness.files(Path(options.include_path), kind) for kind in kinds]
    marks = [one.identity(flags, options.model_args, files, versions) for one in models]
    folders = [options.output / f"{one.name}-{mark}" for one, mark in zip(models, marks)]
    rows, results = [], []
    for key in asked:
        suite = SUITES.get(key) or Suite(key, [key], scale=1.0)
        notes = [_lack(name) for name in suite.needs if not (os.environ.get(name) or shutil.which(name))]
        for one, folder in () if notes else zip(models, folders):
            target = folder / key
            if (target / "results.json").is_file():
                print(f"== {one.name}: {key}: kept from an earlier run, {target}", flush=True)
                continue
            print(f"== {one.name}: {key} (log: {target}.log)", flush=True)
            try:
                harness.score(python, one, suite.tasks, target, torch.cuda.device_count(), options.model_args, passed)
            except ValueError as problem:
                notes.append(f"{one.name}: {problem}")
                print(f"   failed: {problem}", flush=True)
                break
        found = [suite]
        if key not in SUITES and not notes:  # a group or tag of lmms-eval gives a line per task
            found = [Suite(task, [task], scale=1.0) for task in harness.results(folders[0] / key)]
        for row in found:
            results.append({"suite": key, "title": row.title, "metric": row.metric, "notes": notes})
            if not notes:
                fill(results[-1], row, [folder / key for folder in folders])
        rows += found
    size = options.size or ("13b" if "13b" in options.checkpoint.lower() else "7b")
    text = table(rows, results, [one.name for one in models], size, versions)
    everything = {
        "checkpoint": models[0]._asdict(),
        "against": models[1]._asdict() if options.against else None,
        "flags": [*passed, *filter(None, [options.model_args])],
        "versions": versions,
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


def _lack(name: str) -> str:
    if name.isupper():
        return f"{name} is not set in the environment; a judge at OpenAI reads the answers"
    return f"the program {name} is not on PATH: install it (Debian: default-jre-headless)"


def fill(result: Dict, suite: Suite, folders: Sequence[Path]) -> None:
    """Scores and their paired difference, from what lmms-eval left."""
    found = [harness.results(folder) for folder in folders]
    metric = suite.metric or next(iter(found[0][suite.tasks[0]]), None)
    if metric is None or any(metric not in part.get(task, ()) for part in found for task in suite.tasks):
        result["notes"] = [f"lmms-eval printed no number for {metric or 'any metric'}; see {folders[0]}"]
        return
    scores = [[part[task][metric] for task in suite.tasks] for part in found]
    means = [suite.scale * sum(part) / len(part) for part in scores]
    result.update(metric=metric, score=means[0], tasks={task: found[0][task] for task in suite.tasks})
    if len(folders) == 1:
        return
    answers = [[harness.answers(folder, task, metric) for task in suite.tasks] for folder in folders]
    paired = difference(*answers, scores, suite.scale)
    result.update(against=means[1], paired=paired and paired._asdict())
    if paired is None:
        result["notes"] = [f"{metric} has no score per question, or there is one picture only: no paired difference"]


def table(suites: List[Suite], results: List[Dict], names: List[str], size: str, versions: Dict[str, str]) -> str:
    """One line per suite; marks and reasons below it."""
    paired = len(names) == 2
    head = ["suite", "metric", *names, *(PAIRED if paired else [])]
    head += [f"LLaVA-1.5-{size.upper()}", "+ MMFuser"]
    lines, notes = [head], []
    marks: Dict[str, str] = {}
    for suite, result in zip(suites, results):
        digits = 0 if suite.scale == 1000 else 3 if suite.scale == 1 and not suite.paper else 1
        cells = [f"{result[key]:.{digits}f}" if key in result else "–" for key in ("score", "against")[: len(names)]]
        if paired:
            cells += _paired_cells(result.get("paired"), digits)
        before, after = suite.paper.get(size, ("", ""))
        falls = " (falls)" if suite.paper and after < before else ""
        mark = marks.setdefault(suite.differs, str(len(marks) + 1)) if suite.differs else ""
        metric = (result["metric"] or "") + (f" [{mark}]" if mark else "")
        lines.append([suite.title, metric, *cells, f"{before:g}" if before else "", f"{after}{falls}"])
        notes += [f"{suite.title}: {note}" for note in result["notes"]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    text += [
        "",
        "The last two columns are the paper's (arXiv 2410.11829): not measured here, partly by other harnesses.",
    ]
    text += [f"[{mark}] {how}" for how, mark in marks.items()]
    if paired:
        text += [
            f"Difference: {names[0]} less {names[1]}, question by question, with a bootstrap interval over pictures.",
            "An interval with 0 in it does not show a difference. Such a run sees one of 'seen from' in 4 of 5 cases.",
            "McNemar's exact test is for answers that are right or wrong, and takes questions as independent.",
        ]
    if any(not result["paired"]["additive"] for result in results if result.get("paired")):
        text.append("* of the questions' scores, in percent: the metric itself is no mean over questions")
    return "\n".join(text + notes + [", ".join(f"{name} {version}" for name, version in versions.items())])


def _paired_cells(paired: Optional[Dict], digits: int) -> List[str]:
    if paired is None:
        return ["–"] * len(PAIRED)
    digits, star = (digits, "") if paired["additive"] else (1, " *")
    mean, low, high = (f"{paired[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    p = "–" if paired["p"] is None else f"{paired['p']:.2g}"
    counts = f"{paired['questions']} / {paired['pictures']}"
    return [f"{mean} [{low}, {high}]{star}", f"{paired['seen']:.{digits}f}", p, counts]


def listing() -> str:
    """Every suite with its tasks, what it needs beside them, and how its protocol differs from the paper's."""
    lines = []
    for key, suite in SUITES.items():
        lines.append(f"{key} ({suite.title}): {suite.metric} of {', '.join(suite.tasks)}")
        lines += [f"    needs {name}" for name in suite.needs] + [f"    {suite.differs}"] * bool(suite.differs)
    return "\n".join(lines + ["Any other task, group or tag of lmms-eval goes by its own name."])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
