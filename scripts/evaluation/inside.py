"""Runs inside the environment that harness.py makes: lmms-eval and LLaVA side by side.

python inside.py describe OUT.json NAME … [--include_path DIR]    which tasks the names are, and the versions
python inside.py score lmms-eval's arguments …                    lmms-eval, with the checkpoint of $EVALUATE_MODEL
"""

import difflib
import importlib.metadata
import json
import os
import platform
import sys
from inspect import signature
from pathlib import Path
from typing import Dict, List

VERSIONS = ("lmms-eval", "llava-mmfuser", "llava-torch", "llava", "torch", "transformers", "datasets", "pillow")


def describe(out: str, names: List[str]) -> None:
    """Write what the names are: groups and tags as their tasks, data sets and metrics, close names of unknown ones."""
    import torch
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    include = names.index("--include_path") if "--include_path" in names else None
    names, folder = (names, None) if include is None else (names[:include], names[include + 1])
    manager = TaskManager("ERROR", include_path=folder)
    tasks: Dict[str, Dict] = {}

    def members(name: str) -> List[str]:
        row = manager.task_index[name]
        if row["type"] == "tag":
            return [task for member in row["task"] for task in members(member)]
        config = load_yaml_config(row["yaml_path"])
        if row["type"] == "group":
            parts = config["task"]
            return [task for part in parts for task in members(part["task"] if isinstance(part, dict) else part)]
        metrics = [metric["metric"] for metric in config.get("metric_list") or []]
        tasks[name] = {"data": config.get("dataset_path"), "metrics": [str(metric) for metric in metrics]}
        return [name]

    known = [name for name in names if name in manager.task_index]
    found = {
        "unknown": {name: difflib.get_close_matches(name, manager.all_tasks, 8) for name in names if name not in known},
        "count": len(manager.all_tasks),
        "members": {name: members(name) for name in known},
        "tasks": tasks,
        "gpus": torch.cuda.device_count(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
    }
    if torch.cuda.is_available():
        found["versions"]["GPU"] = torch.cuda.get_device_name()
    found["versions"] = {name: version for name, version in found["versions"].items() if version}
    Path(out).write_text(json.dumps(found))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def score() -> None:
    """lmms-eval, whose --model llava knows neither a base model nor paths with '=' or ',' in them.

    It first gives `multimodal`, which LLaVA-NeXT's loader takes and LLaVA's passes on to a TypeError, and loads again.
    """
    import llava.model.builder  # its own error, where lmms-eval would go on without
    import lmms_eval.__main__
    import lmms_eval.models.simple.llava as host

    path, base, name = json.loads(os.environ["EVALUATE_MODEL"])
    loader = llava.model.builder.load_pretrained_model

    def load(*_, multimodal=None, **options):
        named = {"multimodal": multimodal} if "multimodal" in signature(loader).parameters else {}
        return loader(path, base, name, **named, **options)

    host.load_pretrained_model = load
    lmms_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    sys.path[0] = ""  # not this folder's modules
    command = sys.argv.pop(1)
    if command == "describe":
        describe(sys.argv[1], sys.argv[2:])
    else:
        score()
