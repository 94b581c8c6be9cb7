"""Command line: ``python -m llava_mmfuser status`` and ``python -m llava_mmfuser run <script or module> …``."""

import argparse
import os
import runpy
import sys
from typing import List

from . import activation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llava_mmfuser", description="MMFuser for an unmodified LLaVA.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="show versions, every patched symbol and which implementation will run")
    run = commands.add_parser("run", help="run a LLaVA script (path) or module (dotted name) with the hook on")
    run.add_argument("target", help="such as llava/train/train_mem.py or llava.serve.cli")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on unchanged")
    options = parser.parse_args()
    return _status() if options.command == "status" else _run(options.target, options.arguments)


def _run(target: str, arguments: List[str]) -> int:
    activation.activate()
    sys.argv = [target] + arguments
    if os.path.exists(target):
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    return 0


def _status() -> int:
    try:
        from .llava_patch import status
    except ImportError as error:
        sys.stdout.write(f"active: no, {error}; this is the environment {sys.prefix}\n")
        return 1
    found = status()
    lines = [
        f"active: {'yes' if found['active'] else 'no, ' + found['reason']}",
        f"llava: {found['llava'] or 'not found'}",
        f"automatic hook: {'off (' + activation.DISABLE + ' is set)' if activation.disabled() else 'on'}",
        "versions:",
    ]
    lines += [f"  {name}: {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["patch targets:"] + [f"  {state:8}{target}  ({detail})" for target, state, detail in found["targets"]]
    lines += ["sampling:"] + [f"  {device}: {name}" for device, name in found["implementations"].items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if found["active"] else 1


if __name__ == "__main__":
    sys.exit(main())
