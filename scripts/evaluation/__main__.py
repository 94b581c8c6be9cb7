"""Evaluates a checkpoint on the paper's suites and prints one table beside the paper's row.

LLaVA's own twelve run through scripts/v1_5/eval of your LLaVA checkout; OCRBench, region captioning and referring
expressions (REC), which LLaVA lacks, through this folder. GPUs are taken from CUDA_VISIBLE_DEVICES (default 0), one
process each. Finished answers of the same checkpoint and settings that are newer than it are reused, which the table
says; others are set aside (.old). An unfinished file is answered again.
Exit code: 0 if every suite asked for has a score or an upload file, 1 if one is missing or failed, 2 for bad arguments.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Dict, List, Optional

from claims import check, claim, locked
from llava_scripts import prepare, run_script, unparsed
from needs import missing, needs
from processes import exit_on_signals
from progress import answer, read, reused_note, why_not
from settings import Settings, resolve
from suites import SUITES, LlavaSuite, OwnSuite
from table import table

HERE = Path(__file__).resolve().parent


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluate.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="folder, or name on the hub")
    parser.add_argument("suites", metavar="SUITE", nargs="*", help=f"default: all of {', '.join(SUITES)}")
    parser.add_argument("--data", help="data folder (default: playground/data/eval of the LLaVA checkout)")
    parser.add_argument("--llava", help="LLaVA checkout (default: this folder, or the installed one)")
    parser.add_argument("--output", help="results and logs (default: DATA/results/NAME)")
    parser.add_argument("--name", help="what to file the answers under (default: the checkpoint's name)")
    parser.add_argument("--base", help="base model of an adapter or a LoRA (LLaVA's --model-base)")
    parser.add_argument("--conv-mode", help="conversation template (default: what LLaVA's scripts say, vicuna_v1)")
    parser.add_argument("--size", choices=("7b", "13b"), help="the paper's row (default: 13b if CKPT says so, else 7b)")
    parser.add_argument(
        "--box-scale",
        default="1000",
        choices=("100", "999", "1000", "pixels"),
        help="what whole numbers in a box mean (default: 1000 parts of the side); fractions and percent need no word",
    )
    parser.add_argument("--force", action="store_true", help="answer again what is finished")
    parser.add_argument("--list", action="store_true", help="print every suite and what it needs")
    options = parser.parse_intermixed_args(argv)

    if options.list:
        print(listing(Path(options.data or "DATA")))
        return 0
    if options.checkpoint is None:
        parser.error("CKPT is missing")
    unknown = [key for key in options.suites if key not in SUITES]
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    exit_on_signals()
    with contextlib.ExitStack() as held:
        try:
            settings = resolve(options, Path(held.enter_context(tempfile.TemporaryDirectory(prefix="evaluate-"))))
            lock = held.enter_context(locked(settings.data))
            check(settings.data, settings.name, settings.checkpoint)
        except ValueError as problem:
            parser.error(str(problem))
        return run(options, settings._replace(lock=lock))


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Evaluate the suites asked for, write the results and print the table; return the exit code.

    The table also has what earlier runs found for this checkpoint, unchanged since, with these settings.
    """
    scale = None if options.box_scale == "pixels" else float(options.box_scale)
    settings.output.mkdir(parents=True, exist_ok=True)
    prepare(settings.work, settings.llava, settings.data)
    asked = options.suites or list(SUITES)
    of = dict(settings.identity, changed=settings.changed)
    for key in asked:
        print(f"== {key} (log: {settings.output / key}.log)", flush=True)
        result = dict(evaluate(key, settings, scale), of=of)
        write(settings.output / f"{key}.json", json.dumps(result, indent=1))
        print("\n".join(f"   {note}" for note in [result["status"], *result["notes"]]), flush=True)
    files = [settings.output / f"{key}.json" for key in SUITES]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    results = [result for result in results if result.get("of") == of]  # earlier runs' too, but of this very checkpoint
    size = options.size or ("13b" if "13b" in options.checkpoint.lower() else "7b")
    text = table(results, settings.name, size)
    write(settings.output / "results.txt", text + "\n")
    everything = {"checkpoint": settings.checkpoint, "size": size, "suites": results}
    write(settings.output / "results.json", json.dumps(everything, indent=1))
    print(f"\n{text}\n\n{settings.output / 'results.json'}")
    return 0 if all(result["status"] in ("scored", "upload") for result in results if result["suite"] in asked) else 1


def evaluate(key: str, settings: Settings, scale: Optional[float]) -> Dict:
    """Answer and score one suite. What goes wrong is in the result's `status` and `notes`; other suites go on."""
    suite = SUITES[key]
    log = settings.output / f"{key}.log"
    result = {"suite": key, "title": suite.title, "notes": []}
    try:
        lacks = missing(suite, settings.data)
        if isinstance(suite, LlavaSuite):
            script = settings.llava / "scripts" / "v1_5" / "eval" / suite.script
            if not script.is_file():
                lacks.insert(0, f"{script} is missing: give --llava a checkout of github.com/haotian-liu/LLaVA")
        if lacks:
            return dict(result, status="missing", notes=lacks)
        claim(key, settings.data, settings.name, settings.identity)
        if isinstance(suite, LlavaSuite):
            _llava_suite(suite, key, settings, log, result)
        else:
            _own_suite(suite, key, settings, log, result, scale)
    except (ValueError, KeyError, OSError) as problem:  # failed commands, and data or answers that are not as expected
        reason = f"no {problem} in some record" if isinstance(problem, KeyError) else problem
        return dict(result, status="failed", notes=[f"{reason} (log: {log})" if log.is_file() else str(reason)])
    except Exception as problem:  # a benchmark's scorer may raise anything
        with open(log, "a") as output:
            traceback.print_exc(file=output)
        return dict(result, status="failed", notes=[f"{type(problem).__name__}: {problem} (log: {log})"])
    result["notes"] += [f"{count} × {kind}" for kind, count in result["unparsed"].items() if count]
    return result


def _llava_suite(suite: LlavaSuite, key: str, settings: Settings, log: Path, result: Dict) -> None:
    output, result["notes"] = run_script(suite, key, settings, log)
    result["unparsed"] = unparsed(suite, settings.data, settings.name)
    if suite.score:
        result.update(status="scored", score=suite.score(output))
        return
    upload, answers = (settings.data / path.format(name=settings.name) for path in (suite.upload, suite.answers))
    if not upload.is_file() or upload.stat().st_mtime < answers.stat().st_mtime:
        raise ValueError(f"{suite.script} has drifted: it made no new {upload}")
    result.update(status="upload", upload=str(upload))
    result["notes"].append(f"upload {upload} to {suite.server}")


def _own_suite(
    suite: OwnSuite, key: str, settings: Settings, log: Path, result: Dict, scale: Optional[float]
) -> None:
    target = settings.data / suite.answers.format(name=settings.name)
    ids = [str(question["question_id"]) for question in suite.questions_of(settings.data)]
    if not ids:
        raise ValueError(f"{suite.files(settings.data / suite.folder)[0]} holds no question")
    changed = float("inf") if settings.force else settings.changed
    problem = why_not(target, ids, changed)
    reused = [] if problem else [(len(ids), target.stat().st_mtime)]
    if problem:
        command = [str(HERE / "answering.py"), key, "--data", str(settings.data), "--model-path", settings.checkpoint]
        command += ["--model-base", settings.base] if settings.base else []
        command += ["--conv-mode", settings.conv_mode] if settings.conv_mode else []
        with open(log, "w") as output:
            reused = answer(
                lambda part, count, index: [
                    *(sys.executable, *command, "--answers-file", str(part)),
                    *("--num-chunks", str(count), "--chunk-idx", str(index)),
                ],
                ids,
                target,
                settings.gpus,
                changed,
                output=output,
                pass_fds=(settings.lock,),
                PYTHONPATH=settings.python_path,
            )
    scored = suite.scorer(read(target), settings.padded, scale) if key == "rec" else suite.scorer(read(target))
    result.update(scored, status="scored")
    result["notes"] += reused_note(reused, len(ids))


def listing(data: Path) -> str:
    """Every suite with the files it needs below `data`, where to get them, and how it is scored."""
    lines = []
    for key, suite in SUITES.items():
        if isinstance(suite, LlavaSuite):
            scored = f"scored by {suite.script}" if suite.score else f"upload to {suite.server}"
        else:
            scored = "scored here"
        lines.append(f"{key} ({suite.title}): {scored}")
        lines += [f"    {path}: {where}" for path, where in needs(suite, data)]
        lines += [f"    Python library {name}" for name in suite.modules]
        if isinstance(suite, LlavaSuite):
            lines += [f"    environment variable {name}" for name in suite.variables]
        else:
            lines += [f"    program {name}" for name in suite.programs]
    return "\n".join(lines)


def write(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
