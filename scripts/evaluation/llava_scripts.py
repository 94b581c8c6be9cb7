"""Runs LLaVA's own scripts/v1_5/eval/*.sh on another checkpoint and another data folder.

The script of the user's checkout runs unchanged but for the name of its checkpoint, in a work folder whose `llava`,
`scripts` and `playground/data/eval` are links, and with launch.py in place of `python`. bash reads the script, so its
loops, chunks and paths are LLaVA's; a script that no longer fits is an error, never a wrong number.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

from processes import stopped_too
from progress import question_ids, read, reused_note, set_aside, why_not
from settings import Settings
from suites import LlavaSuite

HERE = Path(__file__).resolve().parent


def prepare(work: Path, llava: Path, data: Path) -> None:
    """Make the links and the `python` of an empty work folder."""
    (work / "playground" / "data").mkdir(parents=True)
    (work / "bin").mkdir()
    links = {"llava": llava / "llava", "scripts": llava / "scripts", "playground/data/eval": data}
    for name, target in links.items():
        (work / name).symlink_to(target.resolve(), target_is_directory=True)
    for name in ("python", "python3"):
        program = work / "bin" / name
        program.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{HERE / "launch.py"}" "$@"\n')
        program.chmod(0o755)


def renamed(script: Path, name: str) -> str:
    """The script's text with `name` for its checkpoint. Raises ValueError where it does not name exactly one."""
    text = script.read_text(encoding="utf-8")
    paths = set(re.findall(r"--model-path[ =]+(\S+)", text))
    if len(paths) != 1 or "$" in next(iter(paths)):
        raise ValueError(
            f"{script} has drifted: expected one literal --model-path, found {', '.join(sorted(paths)) or 'none'}"
        )
    theirs = next(iter(paths)).strip("'\"").rstrip("/").split("/")[-1]
    return text.replace(theirs, name)


def run_script(suite: LlavaSuite, key: str, settings: Settings, log: Path) -> Tuple[str, List[str]]:
    """Run the suite's script; return its output, which `log` keeps, and what is to note about the answers.

    Raises ValueError where anything failed.
    """
    work, data, name = settings.work, settings.data, settings.name
    script = settings.llava / "scripts" / "v1_5" / "eval" / suite.script
    answers = data / suite.answers.format(name=name)
    ids = question_ids(data / suite.questions)
    if not ids:
        raise ValueError(f"{data / suite.questions} holds no question")
    failures, reused, copy, job = (work / f"{key}.{kind}" for kind in ("failures", "reused.jsonl", "sh", "job.json"))
    copy.write_text(renamed(script, name), encoding="utf-8")
    job.write_text(
        json.dumps(
            {
                "checkpoint": settings.checkpoint,
                "base": settings.base,
                "conv_mode": settings.conv_mode,
                "gpus": settings.gpus,
                "force": settings.force,
                "changed": settings.changed,
                "script": str(script),
                "questions": str(data / suite.questions),
                "answers": str(answers),
                "ids": ids,
                "failures": str(failures),
                "reused": str(reused),
                "stale": [str(data / path.format(name=name)) for path in suite.derived],
            }
        )
    )
    answers.parent.mkdir(parents=True, exist_ok=True)
    if why_not(answers, ids, float("inf") if settings.force else settings.changed):
        set_aside(answers)
    if suite.upload:  # LLaVA's seed.sh and mmbench_cn.sh expect the folder
        (data / suite.upload.format(name=name)).parent.mkdir(parents=True, exist_ok=True)
    environment = dict(
        os.environ,
        EVALUATION_JOB=str(job),
        PATH=f"{work / 'bin'}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=settings.python_path,
        CUDA_VISIBLE_DEVICES=",".join(settings.gpus),
    )
    with open(log, "w") as output:
        shell = subprocess.Popen(
            [shutil.which("bash"), str(copy)],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(settings.lock,),
            start_new_session=True,  # so that it is stopped together with what it started, in the background, too
        )
        with stopped_too([shell], _signal_group):
            code = shell.wait()
    text = log.read_text(errors="replace")
    if failures.exists():
        problems = failures.read_text().splitlines()
        if suite.merged and any(problem.startswith("answering: ") for problem in problems):
            answers.unlink(missing_ok=True)  # the script has put together whatever chunks there are
        raise ValueError(problems[0])
    if code:
        raise ValueError(f"{script} ended with exit code {code}")
    problem = why_not(answers, ids) if reused.is_file() else "no inference command ran"
    if problem:
        raise ValueError(f"{script} has drifted: it ended without error, but {answers}: {problem}")
    kept = read(reused)
    if sum(count for count, _ in kept) == len(ids):  # merging them has not made them newer
        made = min(made for _, made in kept)
        os.utime(answers, (made, made))
    return text, reused_note(kept, len(ids))


def _signal_group(leader: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)


def unparsed(suite: LlavaSuite, data: Path, name: str) -> Dict[str, int]:
    """How many answers the suite's scorer cannot read, by kind."""
    answers: List[Dict] = read(data / suite.answers.format(name=name))
    bad = sum(not suite.valid(answer["text"]) for answer in answers)
    return {f"answer not as the scorer expects, of {len(answers)}": bad, **suite.extra(data, name)}
