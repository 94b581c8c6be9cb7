"""Compare settings of the fuser over seeds: run what is missing, then print a table and draw a plot.

  ablate.py --output DIR --preset attention
  ablate.py --output DIR --grid mm_fuser_attention deformable dense --grid mm_fuser_num_points 2 4
  ablate.py --output DIR --settings "mlp: --mm_projector_type mlp2x_gelu" "two: --mm_fuser_layers 3,23"
  ablate.py --output DIR --preset fusions --gpus 0,1 2,3 -- bash my.sh {flags} --seed {seed} --output_dir {output}

The first three train on the demo's toy data, whose pictures and pretrained models are made once for all runs.
The first setting is the baseline. The same command again skips what is done, makes a run that was killed or
failed again from scratch, and refuses a DIR whose finished runs came from another command.

Your own command comes after --. In it {flags}, {seed}, {output} (an empty folder), {name} (of the setting) and
{port} (a free one: with DeepSpeed side by side pass --master_port {port}, and neither --include nor --num_gpus)
are replaced. Metrics are the numbers in {output}/metrics.json, {"name": 1.5, ...}, and the mean of the last ten
losses in {output}/trainer_state.json. What your script itself says is not compared with earlier runs: after
editing it, give another --output. LLaVA's train.py makes the projector before it applies --seed: a seed fixes
the order of the data, not the projector's first weights.
"""

import argparse
import importlib.util
import itertools
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from housekeeping import locked

from llava_mmfuser.block.kinds import ATTENTION_KINDS, FUSIONS
from llava_mmfuser.layers import LAYER_SETS

from . import toy_run
from .report import write_report
from .runs import Run, run_all

FUSER = "--mm_projector_type mmfuser"
MLP = {"mlp2x_gelu": "--mm_projector_type mlp2x_gelu"}
PRESETS = {  # the paper's ablations, each against LLaVA's own projector
    "fusions": {
        **MLP,
        **{fusion: f"{FUSER} --mm_fuser_fusion {fusion}" for fusion in FUSIONS},
    },
    "layers": {
        **MLP,
        **{name: f"{FUSER} --mm_fuser_layers {name}" for name in LAYER_SETS if name != "all"},
    },
    "attention": {
        **MLP,
        **{kind: f"{FUSER} --mm_fuser_attention {kind}" for kind in ATTENTION_KINDS},
    },
    "modules": {
        **MLP,
        "cross": f"{FUSER} --mm_fuser_self_attention False",
        "cross+self": f"{FUSER} --mm_fuser_self_attention True",
    },
}
Settings = Dict[str, Tuple[str, ...]]


def parse_arguments(arguments: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    """The options, and the user's own command: what follows the first --."""
    command: List[str] = []
    if "--" in arguments:
        at = list(arguments).index("--")
        arguments, command = arguments[:at], list(arguments[at + 1 :])
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--settings … | --preset … | --grid …] [--seeds …] [options] --output DIR [-- COMMAND …]",
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="runs, table, plot; kept and reused")
    what = parser.add_argument_group("settings (together in this order; the first is the baseline)")
    what.add_argument(
        "--settings",
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME:FLAGS",
        help='named flags, such as "mlp: --mm_projector_type mlp2x_gelu"',
    )
    what.add_argument(
        "--preset",
        nargs="+",
        default=[],
        action="extend",
        choices=PRESETS,
        metavar="NAME",
        help=f"the paper's ablations: {', '.join(PRESETS)}",
    )
    what.add_argument(
        "--grid",
        nargs="+",
        default=[],
        action="append",
        metavar=("FLAG", "VALUE"),
        help="a flag without its dashes and its values, separated by spaces, so that a value may be 3,8,13,18,23; "
        "several --grid make every combination",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--gpus",
        nargs="+",
        metavar="ID",
        help="one run at a time per ID; 0,1 is one run on two GPUs, and 0 0 are two runs on one. Default: one run at "
        "a time, CUDA_VISIBLE_DEVICES as it is (the demo's: on the CPU)",
    )
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="show these only; default: all")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is done; write nothing")
    sizes = parser.add_argument_group("sizes of the demo (defaults as scripts/demo.py)")
    toy_run.add_arguments(sizes, {**toy_run.WORLD, **toy_run.TRAINING})
    return parser.parse_args(arguments), command


def named_settings(texts: Sequence[str]) -> List[Tuple[str, Tuple[str, ...]]]:
    """Settings from "NAME: FLAGS"."""
    named = []
    for text in texts:
        name, colon, flags = text.partition(":")
        if not colon or not name.strip():
            raise ValueError(f'--settings {text!r} has no name; write "NAME: FLAGS", such as "wide: --mm_x 8"')
        try:
            named.append((name.strip(), tuple(shlex.split(flags))))
        except ValueError as error:
            raise ValueError(f"--settings {text!r} is not quoted as in a shell: {error}") from None
    return named


def grid_settings(grid: Sequence[Sequence[str]]) -> List[Tuple[str, Tuple[str, ...]]]:
    """Every combination, named by its values: attention=dense+self_attention=True."""
    for flag, *values in grid:
        if not values or not re.fullmatch(r"\w+", flag):
            raise ValueError(
                f"--grid {' '.join([flag, *values])} is not a flag with its values; "
                f"write --grid mm_fuser_attention deformable dense"
            )
    if not grid:
        return []
    settings = []
    for values in itertools.product(*(values for _, *values in grid)):
        pairs = [(flag, value) for (flag, *_), value in zip(grid, values)]
        name = "+".join(f"{re.sub('^mm_(fuser_)?', '', flag)}={value}" for flag, value in pairs)
        settings.append((name, tuple(part for flag, value in pairs for part in (f"--{flag}", value))))
    return settings


def collect_settings(options: argparse.Namespace) -> Settings:
    presets: Dict[str, str] = {}
    for name in options.preset:
        presets.update(PRESETS[name])  # where two presets share a name, it is the same setting
    listed = named_settings(options.settings)
    listed += [(name, tuple(shlex.split(flags))) for name, flags in presets.items()]
    listed += grid_settings(options.grid)
    if not listed:
        raise ValueError(f"there is nothing to compare; give --settings, --grid or --preset {' | '.join(PRESETS)}")
    folders: Dict[str, str] = {}
    for name, _ in listed:
        folder = folder_name(name)
        if folder in folders:
            raise ValueError(f"the settings {folders[folder]!r} and {name!r} have the same folder name; rename one")
        folders[folder] = name
    return dict(listed)


def folder_name(setting: str) -> str:
    """A safe file name. It holds `llava`, or LLaVA's loader would not take the folder for a LLaVA."""
    return "llava-" + re.sub(r"[^A-Za-z0-9._=+,-]", "-", setting)


def check(options: argparse.Namespace, command: Sequence[str], settings: Settings) -> None:
    """Refuse early what would otherwise be found after hours of running."""
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, options.seeds))} has a seed twice; use each once")
    needed = ("matplotlib",) if command else ("matplotlib", *toy_run.NEEDED)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{sys.executable} has no {', '.join(missing)}; install what is missing, or use the environment that "
            f"scripts/demo.sh makes: .demo/env/bin/python"
        )
    if not command:
        return
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]}: there is no such command; write -- bash my_script.sh {{flags}} …")
    for name, (default, _) in {**toy_run.WORLD, **toy_run.TRAINING}.items():
        if getattr(options, name) != default:
            setting = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise ValueError(f"{setting} is a size of the demo, which your own command does not see; leave it out")
    text = " ".join(command)
    for placeholder, required, why in (
        ("{flags}", any(settings.values()), "all settings would be the same"),
        ("{seed}", len(options.seeds) > 1, "all seeds would be the same"),
        ("{output}", True, "all runs would write to the same place"),
    ):
        if required and placeholder not in text:
            raise ValueError(f"your command has no {placeholder}: {why}; put it where your script takes it")


def plan(root: Path, settings: Settings, seeds: Sequence[int], template: Sequence[str]) -> List[Run]:
    """All settings with the first seed come first, so that an unfinished table already compares like with like."""
    return [
        Run(name, flags, seed, tuple(template), root / "runs" / f"{folder_name(name)}-seed{seed}")
        for seed in seeds
        for name, flags in settings.items()
    ]


def records(runs: Sequence[Run]) -> List[dict]:
    found = []
    for run in runs:
        record = run.record() or {"status": "waiting", **run.identity()}
        found.append({**record, "log": str(run.log)})
    return found


class Progress:
    """A line when a run starts and one when it ends; the report is kept up to date in between."""

    def __init__(self, runs: Sequence[Run], waiting: int, settings: Settings, options: argparse.Namespace, root: Path):
        self.runs, self.left, self.settings, self.options, self.root = runs, waiting, settings, options, root
        self.seconds: List[float] = []

    def report(self) -> str:
        return write_report(self.root, records(self.runs), self.settings, self.options.metrics)

    def started(self, run: Run, gpu: Optional[str]) -> None:
        where = "" if gpu is None else f" on GPU {gpu}"
        print(f"started  {run.label}{where}: {run.log}", flush=True)

    def ended(self, run: Run, record: dict) -> None:
        self.seconds.append(record["seconds"])
        if record["status"] == "done":
            outcome = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
        else:
            lines = run.log.read_text(errors="replace").replace("\r", "\n").split("\n")
            outcome = f"{record['problem']}: {next((line for line in reversed(lines) if line.strip()), '')}; {run.log}"
        self.left -= 1
        minutes = sum(self.seconds) / len(self.seconds) * self.left / len(self.options.gpus or [None]) / 60
        print(f"{record['status']:7}  {run.label}: {outcome} ({self.left} left, about {minutes:.0f} min)", flush=True)
        self.report()


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    options, command = parse_arguments(arguments)
    root = options.output.resolve()
    world = root / "world"
    try:
        settings = collect_settings(options)
        check(options, command, settings)
        runs = plan(root, settings, options.seeds, command or toy_run.run_command(world, options))
        world_needed = not command and not toy_run.world_is_made(world, options)
        if options.dry_run:
            for run in runs:
                print(f"# {run.label}: {'done' if run.done() else 'to run'}\n{shlex.join(run.command(29500))}")
            return 0
        (root / "runs").mkdir(parents=True, exist_ok=True)
        with locked(root, "ablate.py, or by a run that one left behind when it was killed") as lock:
            waiting = [run for run in runs if not run.done()]
            return execute(options, settings, runs, waiting, world if world_needed and waiting else None, lock)
    except ValueError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2


def execute(
    options: argparse.Namespace,
    settings: Settings,
    runs: Sequence[Run],
    waiting: Sequence[Run],
    world: Optional[Path],
    lock: int,
) -> int:
    """Make the world if one is given, run what waits, report."""
    root = options.output.resolve()
    progress = Progress(runs, len(waiting), settings, options, root)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    done = len(runs) - len(waiting)
    print(f"{len(settings)} settings x {len(options.seeds)} seeds: {done} done, {len(waiting)} to run", flush=True)
    try:
        if world is not None:
            made = subprocess.run(toy_run.world_command(world, options), pass_fds=(lock,))
            if made.returncode:
                raise ValueError(f"exit status {made.returncode} while the demo's pictures and models were made")
        run_all(waiting, options.gpus or (None,), lock, progress.started, progress.ended)
    except KeyboardInterrupt:
        progress.report()
        print(f"\nInterrupted. The same command goes on; so far: {root / 'table.txt'}", file=sys.stderr)
        return 130
    print(f"\n{progress.report()}")
    print(f"Files: {root}/{{table.txt,results.json,results.csv,ablation.png}}")
    return int(any(record["status"] != "done" for record in records(runs)))
