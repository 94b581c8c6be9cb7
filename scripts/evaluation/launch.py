"""Stands in for `python` inside LLaVA's evaluation scripts (llava_scripts.py puts it on their PATH).

LLaVA's scripts have no `set -e`, name one checkpoint, and answer every question again. Here each of their commands runs
as written, except that an inference command gets the user's checkpoint, keeps answers that are finished, and spreads
over all GPUs where the script uses one; and that after a failed command no other one runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

from progress import Reused, answer, chunk, set_aside, why_not


def option(arguments: List[str], name: str) -> Optional[str]:
    return arguments[arguments.index(name) + 1] if name in arguments[:-1] else None


def replaced(arguments: List[str], name: str, value: str) -> List[str]:
    """`arguments` with the option `name` set to `value`, in its place or at the end."""
    if name not in arguments:
        return [*arguments, name, value]
    place = arguments.index(name) + 1
    return arguments[:place] + [value] + arguments[place + 1 :]


def infer(arguments: List[str], job: Dict) -> List[Reused]:
    """Run one inference command of a script, unless an earlier command failed; return which answers are not new.

    Whatever happens, no stale answers are left where the script's `cat` would pick them up.
    Raises ValueError where the command fails, or is not the one that the suite's row expects.
    """
    questions, target = (option(arguments, name) for name in ("--question-file", "--answers-file"))
    if questions is None or Path(questions).resolve() != Path(job["questions"]).resolve() or target is None:
        raise ValueError(
            f"{job['script']} has drifted: it answers --question-file {questions} into --answers-file {target}; "
            f"expected {job['questions']}. Adapt the suite's row in suites.py"
        )
    target = Path(target).resolve()  # below the data folder, not below the work folder's link to it
    count, index = int(option(arguments, "--num-chunks") or 1), int(option(arguments, "--chunk-idx") or 0)
    ids = chunk(job["ids"], count, index)
    changed = float("inf") if job["force"] else job["changed"]
    problem = why_not(target, ids, changed)
    if not problem:
        print(f"reusing {target}: {len(ids)} answers", flush=True)
        return [(len(ids), target.stat().st_mtime)]
    whole = Path(job["answers"])
    if whole.resolve() != target and not why_not(whole, job["ids"], changed):
        # Finished with another number of GPUs, whose chunk files have other names.
        print(f"reusing {whole} for chunk {index} of {count}", flush=True)
        target.write_text("".join(chunk(whole.read_text().splitlines(keepends=True), count, index)))
        made = whole.stat().st_mtime
        os.utime(target, (made, made))
        return [(len(ids), made)]
    for file in (target, *map(Path, job["stale"])):
        set_aside(file)
    if Path(job["failures"]).exists():
        return []
    print(f"answering into {target}: {problem}", flush=True)
    arguments = replaced(arguments, "--model-path", job["checkpoint"])
    if job["base"]:
        arguments = replaced(arguments, "--model-base", job["base"])
    if job["conv_mode"]:
        arguments = replaced(arguments, "--conv-mode", job["conv_mode"])

    def command(part: Path, parts: int, number: int) -> List[str]:
        final = replaced(arguments, "--answers-file", str(part))
        if parts > 1:
            final = replaced(replaced(final, "--num-chunks", str(parts)), "--chunk-idx", str(number))
        return [sys.executable, *final]

    if not ids:  # more GPUs than chunks, which LLaVA's get_chunk does not expect
        target.write_text("")
        return []
    gpus = [os.environ.get("CUDA_VISIBLE_DEVICES", "0")] if count > 1 else job["gpus"]
    return answer(command, ids, target, gpus, changed)


def main(arguments: List[str]) -> int:
    job = json.loads(Path(os.environ["EVALUATION_JOB"]).read_text())
    failures = Path(job["failures"])
    module = arguments[1] if arguments[0] == "-m" else arguments[0].replace("/", ".")
    inference = "llava.eval.model_" in module
    try:
        if inference:
            reused = infer(arguments, job)
            with open(job["reused"], "a") as record:
                record.write("".join(json.dumps(found) + "\n" for found in reused))
        elif not failures.exists():
            code = subprocess.call([sys.executable, *arguments])
            if code:
                raise ValueError(f"{' '.join(arguments)} ended with exit code {code}")
    except (ValueError, OSError) as problem:
        with open(failures, "a") as record:
            record.write(f"{'answering' if inference else 'scoring'}: {problem}\n")
        print(problem, flush=True)
    return int(failures.exists())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
