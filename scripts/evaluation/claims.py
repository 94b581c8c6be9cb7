"""Whose answers a data folder holds, so that those of another checkpoint or of other settings are never reused.

`evaluated_checkpoints.json` in the data folder says for each name and suite what the answers filed there are of. What
it does not mention is somebody else's: LLaVA's eval.zip brings answers of LLaVA-1.5.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Union

from progress import set_aside
from suites import SUITES, LlavaSuite, OwnSuite

RECORD = "evaluated_checkpoints.json"


def _claims(data: Path, name: str) -> Dict[str, Dict[str, Optional[str]]]:
    """Suite -> {checkpoint, base, conv_mode} of the answers filed under `name`."""
    record = data / RECORD
    return json.loads(record.read_text()).get(name, {}) if record.is_file() else {}


def answers_of(suite: Union[LlavaSuite, OwnSuite], data: Path, name: str) -> List[Path]:
    """Every file of answers to `suite` filed under `name`: whole ones, chunks, and what an interrupted run left."""
    answers = data / suite.answers.format(name=name)
    merged = isinstance(suite, LlavaSuite) and suite.merged
    files = answers.parent.iterdir() if answers.parent.is_dir() else ()
    return [
        file
        for file in files
        if file.suffix in (".jsonl", ".partial") and (merged or file.name.startswith(answers.name))
    ]


def check(data: Path, name: str, checkpoint: str) -> None:
    """Raises ValueError where `data` holds answers of another checkpoint under this name."""
    for key, claimed in _claims(data, name).items():
        if claimed["checkpoint"] != checkpoint and answers_of(SUITES[key], data, name):
            raise ValueError(
                f"--name is {name}: answers of that name below {data} are of {claimed['checkpoint']}, not of "
                f"{checkpoint}; give another --name, or delete those answers and the entry in {data / RECORD}"
            )


def claim(key: str, data: Path, name: str, identity: Dict[str, Optional[str]]) -> None:
    """Note that answers to suite `key` under `name` are `identity`'s from now on; set aside what is there of others."""
    if _claims(data, name).get(key) == identity:
        return
    for file in answers_of(SUITES[key], data, name):
        set_aside(file)
    record = data / RECORD
    owners = json.loads(record.read_text()) if record.is_file() else {}
    owners.setdefault(name, {})[key] = identity
    fresh = record.with_name(record.name + ".partial")
    fresh.write_text(json.dumps(owners, indent=1))
    os.replace(fresh, record)


@contextlib.contextmanager
def locked(data: Path) -> Iterator[int]:
    """Hold `data` for this process, and for those that are given the file descriptor.

    LLaVA's scripts keep predictions of different checkpoints in one file, so that two runs would mix them.
    Raises ValueError where another evaluation holds it.
    """
    with open(data / "evaluate.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--data is {data}: another evaluation, or what one left behind when it was killed, is using it and "
                f"holds {file.name}; wait for it, stop it, or give another folder"
            ) from None
        yield file.fileno()
