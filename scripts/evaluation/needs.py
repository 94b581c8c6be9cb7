"""What a suite needs before it can run, and what of that is missing."""

import importlib.metadata
import importlib.util
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import List, Tuple, Union

from progress import read
from suites import LlavaSuite, OwnSuite

Suite = Union[LlavaSuite, OwnSuite]


def needs(suite: Suite, data: Path) -> List[Tuple[Path, str]]:
    """(path, where to get it) of everything the suite reads, the pictures that its questions name apart."""
    if isinstance(suite, LlavaSuite):
        return [(data / path, where) for path, where in suite.needs]
    return [(path, suite.where) for path in suite.files(data / suite.folder)]


def missing(suite: Suite, data: Path) -> List[str]:
    """What the suite lacks, a sentence each: files, pictures that its questions name, libraries, programs."""
    absent = defaultdict(list)
    for path, where in needs(suite, data):
        if not path.exists():
            absent["missing", where].append(str(path))
        elif not (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
            absent["empty", where].append(str(path))
    lacks = []
    for (state, where), paths in absent.items():
        verb, them = ("is", "it") if len(paths) == 1 else ("are", "them")
        lacks.append(f"{', '.join(paths)} {verb} {state}: get {them} from {where}")
    lacks = lacks or _missing_pictures(suite, data)
    for requirement in suite.modules:
        name, _, limit = requirement.partition("<")
        if importlib.util.find_spec(name) is None:
            lacks.append(f"the Python library {name} is missing: pip install '{requirement}'")
        elif limit and int(importlib.metadata.version(name).split(".")[0]) >= int(limit):
            lacks.append(f"the Python library {name} is too new: pip install '{requirement}'")
    if isinstance(suite, OwnSuite):
        for name in suite.programs:
            if shutil.which(name) is None:
                lacks.append(f"the program {name} is not on PATH: install it (Debian: default-jre-headless)")
    else:
        lacks += [f"{name} is not set in the environment" for name in suite.variables if not os.environ.get(name)]
    return lacks


def _missing_pictures(suite: Suite, data: Path) -> List[str]:
    if isinstance(suite, OwnSuite):
        questions = suite.questions_of(data)
        # RefCOCO's pictures are inside its files: (file, row group, row) instead of a path.
        wanted, where = [Path(row["image"]) for row in questions if isinstance(row["image"], str)], suite.where
    elif suite.images is None:
        return []
    else:
        wanted = [data / suite.images / row["image"] for row in read(data / suite.questions) if "image" in row]
        where = dict(suite.needs).get(suite.images) or " and ".join(dict.fromkeys(dict(suite.needs).values()))
    wanted = list(dict.fromkeys(wanted))
    absent = [path for path in wanted if not os.path.exists(path)]
    if not absent:
        return []
    return [f"{len(absent)} of {len(wanted)} pictures are missing, the first is {absent[0]}: get them from {where}"]
