"""One run of an ablation on the demo's toy data: pretrain, finetune, ask about the held-out pictures.

scripts/ablate.py starts this file once for the toy world and once per run. The demo's code, and torch with it, is
imported only where it is used: ablate.py itself imports this file.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Sequence

WORLD = {  # what the pictures, the vision tower and the language model depend on; defaults of scripts/demo.py
    "pictures": (3000, "training pictures"),
    "heldout": (200, "held-out pictures"),
    "clip_steps": (600, "steps that train the vision tower"),
    "llama_steps": (400, "steps that train the language model on text"),
}
TRAINING = {"pretrain_steps": (120, "steps of stage 1"), "finetune_steps": (200, "steps of stage 2")}
NEEDED = ("llava", "llava_mmfuser", "deepspeed", "sentencepiece", "sklearn", "skimage")  # as demo.sh --here
WORLD_SEED = 0  # as in a real ablation, data and pretrained models are given: --seeds vary the training only


def add_arguments(parser: argparse._ActionsContainer, settings: Dict[str, tuple]) -> None:
    for name, (default, text) in settings.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=text)


def arguments(options: argparse.Namespace, settings: Dict[str, tuple]) -> List[str]:
    return [part for name in settings for part in ("--" + name.replace("_", "-"), str(getattr(options, name)))]


def world_is_made(world: Path, options: argparse.Namespace) -> bool:
    """Whether `world` is there.

    Raises:
        ValueError: it is there, with other sizes.
    """
    if not world.exists():
        return False
    made = json.loads((world / "world.json").read_text())
    for name in WORLD:
        if made[name] != getattr(options, name):
            setting = "--" + name.replace("_", "-")
            raise ValueError(
                f"{setting} {getattr(options, name)}: {world} was made with {setting} {made[name]}; "
                f"use that, or give another --output"
            )
    return True


def world_command(world: Path, options: argparse.Namespace) -> List[str]:
    return [sys.executable, __file__, "world", str(world), *arguments(options, WORLD)]


def run_command(world: Path, options: argparse.Namespace) -> List[str]:
    """The command of every run, with ablate.py's placeholders."""
    device = "cuda" if options.gpus else "cpu"
    training = arguments(options, TRAINING)
    where = ["--seed", "{seed}", "--output", "{output}", "--device", device]
    return [sys.executable, __file__, "run", str(world), *training, *where, "--", "{flags}"]


def make_world(world: Path, options: argparse.Namespace) -> None:
    import demo

    incomplete = world.with_name(world.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    options.seed = WORLD_SEED
    demo.make_world(incomplete, options, demo.Progress(0))
    (incomplete / "world.json").write_text(json.dumps({name: getattr(options, name) for name in WORLD}))
    incomplete.rename(world)


def projector_type(flags: Sequence[str]) -> str:
    """The last --mm_projector_type among the flags; mmfuser if there is none."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--mm_projector_type", default="mmfuser")
    return parser.parse_known_args(flags)[0].mm_projector_type


def train_and_ask(world: Path, options: argparse.Namespace, flags: Sequence[str]) -> Dict[str, float]:
    """Both stages through LLaVA's train.py, then the questions; losses, and the percentages of right answers."""
    import demo

    variant = projector_type(flags)
    metrics = {}
    for stage in ("pretrain", "finetune"):
        command = demo.train_command(world, options.output, variant, stage, options, options.device, flags)
        demo.run(command, options.output / f"{stage}.log")
        curve = demo.losses(options.output / f"llava-{variant}-{stage}")
        metrics[f"{stage} loss"] = demo.final_loss(curve)
    records = json.loads((world / "data" / "heldout.json").read_text())
    given = demo.answer(options.output / f"llava-{variant}-finetune", world / "data", records, options.device)
    for kind, value in demo.accuracy(given["answers"], records).items():
        metrics[f"{kind} right (%)"] = 100 * value
    return metrics


def main() -> None:
    given, flags = sys.argv[1:], []
    if "--" in given:
        given, flags = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    make = modes.add_parser("world")
    run = modes.add_parser("run")
    for mode in (make, run):
        mode.add_argument("world", type=Path)
    add_arguments(make, WORLD)
    add_arguments(run, TRAINING)
    run.add_argument("--seed", type=int, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--device", default="cpu")
    options = parser.parse_args(given)
    # Threads that spin while they wait make every step four times slower when something else uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.mode == "world":
        make_world(options.world, options)
    else:
        metrics = train_and_ask(options.world, options, flags)
        (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
