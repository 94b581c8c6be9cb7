"""Answers files: which are finished, and how several GPUs share one."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Callable, Dict, List, Optional, Sequence, Tuple

from processes import stopped_too

Reused = Tuple[int, float]  # so many answers of an earlier run, and when they were made


def reused_note(reused: Sequence[Reused], total: int) -> List[str]:
    """What a result says about answers that were not made now; nothing where there are none."""
    if not any(count for count, _ in reused):
        return []
    oldest = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(made for count, made in reused if count)))
    return [f"reused {sum(count for count, _ in reused)} of {total} answers, made {oldest}"]


def chunk(items: Sequence, count: int, index: int) -> Sequence:
    """Part `index` of `count` as LLaVA's get_chunk cuts it: ceil(len / count) items each, the last ones fewer."""
    size = math.ceil(len(items) / count)
    return items[index * size : (index + 1) * size]


def question_ids(file: Path) -> List[str]:
    """The ids of a question file in its order, as text: .jsonl (question_id), ScienceQA's .json (id), .tsv (index)."""
    if file.suffix == ".tsv":
        csv.field_size_limit(sys.maxsize)  # the pictures are in the table
        with open(file, newline="", encoding="utf-8") as lines:
            return [row["index"] for row in csv.DictReader(lines, delimiter="\t")]
    if file.suffix == ".json":
        return [str(row["id"]) for row in read(file)]
    return [str(row["question_id"]) for row in read(file)]


def read(file: Path) -> List[Dict]:
    """The records of a .jsonl or .json file. Raises ValueError, naming file and line, where it is not JSON."""
    if file.suffix == ".json":
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{file} is not JSON ({problem}); is the file complete?") from None
    records = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError as problem:
                raise ValueError(f"{file}, line {number} is not JSON ({problem}); is the file complete?") from None
    return records


def why_not(answers: Path, ids: Sequence[str], changed: float = 0) -> str:
    """Why `answers` is not a finished answers file for the questions `ids`; "" if it is.

    `changed`: when the checkpoint last changed; answers older than that are another checkpoint's. Infinity: redo all.
    """
    if not answers.is_file():
        return "there is none"
    try:
        found = [str(row["question_id"]) for row in read(answers)]
    except ValueError as problem:
        return str(problem)
    if found != list(ids):
        return f"its {len(found)} answers are not those to the {len(ids)} questions"
    if answers.stat().st_mtime < changed:
        return "--force" if math.isinf(changed) else "the checkpoint is newer"
    return ""


def set_aside(file: Path) -> None:
    """Give a file that must not be reused the ending .old, where nothing looks for it; do nothing if there is none."""
    if file.exists():
        os.replace(file, file.with_name(file.name + ".old"))


def answer(
    command: Callable[[Path, int, int], List[str]],
    ids: Sequence[str],
    target: Path,
    gpus: Sequence[str],
    changed: float,
    output: Optional[IO] = None,
    pass_fds: Sequence[int] = (),
    **environment: str,
) -> List[Reused]:
    """Run `command(answers, chunks, index)` once per GPU, each on its chunk, and put the chunks together in `target`.

    `ids`: of the questions, at least one. Never more chunks than there are chunks with questions. A chunk that an
    earlier, interrupted run finished is kept, and returned.
    Raises ValueError where a process fails or leaves fewer answers than questions.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    count = math.ceil(len(ids) / math.ceil(len(ids) / len(gpus)))
    parts = [target.with_name(f"{target.name}.{count}_{index}.partial") for index in range(count)]
    waiting = [index for index, part in enumerate(parts) if why_not(part, chunk(ids, count, index), changed)]
    kept = [index for index in range(count) if index not in waiting]
    reused = [(len(chunk(ids, count, index)), parts[index].stat().st_mtime) for index in kept]
    running: List[subprocess.Popen] = []
    with stopped_too(running):
        for index in waiting:
            running.append(
                subprocess.Popen(
                    command(parts[index], count, index),
                    env=dict(os.environ, CUDA_VISIBLE_DEVICES=gpus[index], **environment),
                    stdout=output,
                    stderr=output and subprocess.STDOUT,
                    pass_fds=pass_fds,
                )
            )
        codes = {index: process.wait() for index, process in zip(waiting, running)}
    for index, part in enumerate(parts):
        code = codes.get(index, 0)
        problem = why_not(part, chunk(ids, count, index))
        if code or problem:
            raise ValueError(f"chunk {index} of {count} ended with exit code {code}; {part}: {problem or 'complete'}")
    whole = target.with_name(target.name + ".partial")
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    os.replace(whole, target)
    for part in parts:
        part.unlink()
    return reused
