"""One run of an ablation on the demo's toy data: pretrain, finetune, ask about held-out pictures.

`ablate.py toy …` is started once for the toy world and once per run. torch is imported only where it is used: the
command line imports this file.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from toy.recipe import FUSER, STAGES, final
from toy.recipe import STEPS as TRAINING
from toy.world import SIZES as WORLD
from toy.world import make_world

from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.config import PROJECTOR_TYPE

NEEDED = ("llava", "llava_mmfuser", "deepspeed", "sentencepiece", "sklearn", "skimage")  # as demo.sh --here
WORLD_SEED = 0  # as in a real ablation, data and pretrained models are given: --seeds vary the training only
WHITENING, RELEASED = "whitening.pt", "llava-released"  # in the world, where study.py made it
SCRIPT = Path(__file__).resolve().parent.parent / "ablate.py"


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
    file = world / "world.json"
    made = json.loads(file.read_text()) if file.exists() else {}
    for name in WORLD:
        if made.get(name) != getattr(options, name):
            setting = "--" + name.replace("_", "-")
            raise ValueError(
                f"{setting} {getattr(options, name)}: {world} was made with {setting} {made.get(name)}; "
                f"use that, or give another --output"
            )
    return True


def world_command(world: Path, options: argparse.Namespace) -> List[str]:
    return [sys.executable, str(SCRIPT), "toy", "world", str(world), *arguments(options, WORLD)]


def run_command(world: Path, options: argparse.Namespace) -> List[str]:
    """The command of every run, with ablate.py's placeholders."""
    device = "cuda" if options.gpus else "cpu"
    training = arguments(options, TRAINING)
    where = ["--seed", "{seed}", "--output", "{output}", "--device", device]
    return [sys.executable, str(SCRIPT), "toy", "run", str(world), *training, *where, "--", "{flags}"]


def make(world: Path, options: argparse.Namespace) -> None:
    incomplete = world.with_name(world.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    sizes = {name: getattr(options, name) for name in WORLD}
    make_world(incomplete, sizes, WORLD_SEED, lambda text: print(text, flush=True))
    (incomplete / "world.json").write_text(json.dumps(sizes))
    incomplete.rename(world)


def trains_fusion(flags: Sequence[str]) -> bool:
    """Whether a setting has a fusion with weights of its own, which `--mm_fuser_lr` is for."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--mm_projector_type", default=PROJECTOR_TYPE)
    parser.add_argument("--mm_fuser_fusion")
    given = parser.parse_known_args(flags)[0]
    kind = FUSIONS.get(given.mm_fuser_fusion, FUSIONS["mmfuser"])  # train.py says what is wrong with an unknown one
    return given.mm_projector_type == PROJECTOR_TYPE and kind.has_weights


def own_rate(flags: Sequence[str]) -> List[str]:
    """The toy's rate for the fuser, unless the flags name one or there is nothing to train: see docs/study.md."""
    given = any(flag.split("=")[0] == "--mm_fuser_lr" for flag in flags)
    return ["--mm_fuser_lr", str(FUSER["mm_fuser_lr"])] if trains_fusion(flags) and not given else []


def toy_flags(flags: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    """The flags that a setting has for the toy itself, and those for train.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--toy_whiten", action="store_true")  # the map that LLaVA takes
    parser.add_argument("--toy_released", action="store_true")  # finetune the world's plain LLaVA, all steps long
    parser.add_argument("--toy_finetune_rate")  # of stage 2; as that of stage 1 if not given
    return parser.parse_known_args(flags)


def train(world: Path, options: argparse.Namespace, flags: Sequence[str]) -> dict:
    """Both stages through LLaVA's train.py.

    Returns:
        `losses` and `gates`, by stage; `seconds`, of the processor where there is no GPU.
    """
    from toy import recipe, whitening

    toy, flags = toy_flags(flags)
    run = functools.partial(whitening.whitened, world / WHITENING, recipe.run_train_py) if toy.toy_whiten else None
    given = {**recipe.DEMO, "use_cpu": options.device == "cpu"}
    steps = {stage: getattr(options, f"{stage}_steps") for stage in STAGES}
    if toy.toy_released:
        given["model_name_or_path"] = world / RELEASED
        steps = {"finetune": sum(steps.values())}
    found = {"losses": {}, "gates": {}, "seconds": 0.0}
    for stage in steps:
        output, log = options.output / f"llava-{stage}", options.output / f"{stage}.log"
        arguments = recipe.train_arguments(world, output, stage, **given, max_steps=steps[stage])
        arguments += [*own_rate(flags), *flags]
        if stage == "finetune" and toy.toy_finetune_rate:
            arguments += ["--learning_rate", toy.toy_finetune_rate]
        seconds, processor = recipe.train(arguments, options.seed, log, run)
        given["pretrain_mm_mlp_adapter"] = output / "mm_projector.bin"
        found["seconds"] += processor if options.device == "cpu" else seconds
        found["losses"][stage] = recipe.curve(output, "loss")
        found["gates"][stage] = recipe.curve(output, "mm_fuser_cross_gate")
    return found


def ask(world: Path, options: argparse.Namespace, flags: Sequence[str]) -> dict:
    """Ask the trained model about the pictures that it did not train on.

    Returns:
        `right`, by split and kind of question a 0 or 1 per picture; `parameters` of the projector.
    """
    from toy import asking, recipe, whitening

    answer = asking.answer
    if toy_flags(flags)[0].toy_whiten:
        answer = functools.partial(whitening.whitened, world / WHITENING, answer)
    right = {}
    for split in ("validation", "heldout"):
        records = json.loads((world / "data" / f"{split}.json").read_text())
        model, data, log = options.output / "llava-finetune", world / "data", options.output / f"{split}.log"
        if records:
            found = recipe.in_child(answer, model, data, records, options.device, log=log)
            right[split] = asking.right(found["answers"], records)
    return {"right": right, "parameters": found["parameters"]}


def metrics(details: dict) -> Dict[str, float]:
    """Losses, gates, and percentages of right answers about held-out pictures."""
    found = {f"{stage} loss": final(losses) for stage, losses in details["losses"].items()}
    if details["gates"]["finetune"]:
        found["cross gate"] = details["gates"]["finetune"][-1]
    for kind, right in details["right"]["heldout"].items():
        found[f"{kind} right (%)"] = 100 * sum(right) / len(right)
    return found


def main(given: List[str]) -> None:
    flags: List[str] = []
    if "--" in given:
        given, flags = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    world = modes.add_parser("world")
    run = modes.add_parser("run")
    for mode in (world, run):
        mode.add_argument("world", type=Path)
    add_arguments(world, WORLD)
    add_arguments(run, TRAINING)
    run.add_argument("--seed", type=int, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--device", default="cpu")
    options = parser.parse_args(given)
    # Threads that spin while they wait make every step four times slower when something else uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.mode == "world":
        make(options.world, options)
    else:
        details = {**train(options.world, options, flags), **ask(options.world, options, flags)}
        (options.output / "details.json").write_text(json.dumps(details))
        (options.output / "metrics.json").write_text(json.dumps(metrics(details), indent=1))
