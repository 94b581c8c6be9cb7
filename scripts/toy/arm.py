"""Pretrain, finetune, ask about held-out pictures: a variant of the demo, or a run of the study, by `study.py run`."""

import argparse
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Callable, List, Sequence, Tuple

from housekeeping import write

from . import asking, recipe, whitening

WHITENING, RELEASED = "whitening.pt", "llava-released"  # in the world, where study.py made them


def toy_flags(flags: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    """The flags that an arm has for the toy itself, and those for train.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--toy_whiten", action="store_true")  # the map that LLaVA takes
    parser.add_argument("--toy_released", action="store_true")  # finetune the world's plain LLaVA, all steps long
    parser.add_argument("--toy_finetune_rate")  # of stage 2; as that of stage 1 if not given
    return parser.parse_known_args(flags)


def train(
    world: Path,
    output: Path,
    given: Sequence[str],
    steps: Sequence[int],
    seed: int,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Both stages through LLaVA's train.py, below `output`; `steps` are those of each, and `say` is told which begins.

    Returns:
        `losses` and `gates`, by stage; `seconds`, of the processor where there is no GPU.
    """
    toy, flags = toy_flags(given)
    whiten = functools.partial(whitening.whitened, world / WHITENING, recipe.run_train_py)
    options = {**recipe.DEMO, "use_cpu": device == "cpu"}
    stages = dict(zip(recipe.STAGES, steps))
    if toy.toy_released:
        options["model_name_or_path"] = world / RELEASED
        stages = {"finetune": sum(steps)}
    found = {"losses": {}, "gates": {}, "seconds": 0.0}
    output.mkdir(parents=True, exist_ok=True)
    for stage, count in stages.items():
        say(f"{stage}, LLaVA's train.py")
        made, log = output / f"llava-{stage}", output / f"{stage}.log"
        arguments = recipe.train_arguments(world, made, stage, **options, max_steps=count) + flags
        if stage == "finetune" and toy.toy_finetune_rate:
            arguments += ["--learning_rate", toy.toy_finetune_rate]
        seconds, processor = recipe.train(arguments, seed, log, whiten if toy.toy_whiten else None)
        options["pretrain_mm_mlp_adapter"] = made / "mm_projector.bin"
        found["seconds"] += processor if device == "cpu" else seconds
        found["losses"][stage] = recipe.curve(made, "loss")
        found["gates"][stage] = recipe.curve(made, "mm_fuser_cross_gate")
    return found


def ask(world: Path, output: Path, given: Sequence[str], split: str, device: str = "cpu", shut: bool = False) -> dict:
    """What `asking.answer` returns of the trained model, and `right`: by kind of question a 0 or 1 per picture."""
    answer, data = asking.answer, world / "data"
    if toy_flags(given)[0].toy_whiten:
        answer = functools.partial(whitening.whitened, world / WHITENING, answer)
    records = json.loads((data / f"{split}.json").read_text())
    model, log = output / "llava-finetune", output / f"{split}.log"
    found = recipe.in_child(answer, model, data, records, device, shut, log=log)
    return {**found, "right": asking.right(found["answers"], records)}


def made_by(flags: Sequence[str], seed: int, steps: Sequence[int], device: str) -> dict:
    """What a result must agree with to stand for a run."""
    return {"flags": list(flags), "seed": seed, "steps": list(steps), "device": device}


def main(given: Sequence[str]) -> None:
    """Write details.json into the output folder, at the end and whole."""
    parser = argparse.ArgumentParser(prog="study.py run", description=__doc__)
    parser.add_argument("world", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=[default for default, _ in recipe.STEPS.values()])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="the trained models, too; many of them fill a disk")
    parser.epilog = "Behind a --: flags of train.py, --toy_whiten, --toy_released, --toy_finetune_rate."
    at = list(given).index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:at]), list(given[at + 1 :])
    # Threads that spin while they wait make every step four times slower when something else uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    world, output = options.world, options.output
    details = train(world, output, flags, options.steps, options.seed, options.device)
    asked = {split: ask(world, output, flags, split, options.device) for split in ("validation", "heldout")}
    details["right"] = {split: found["right"] for split, found in asked.items()}
    details["parameters"] = asked["heldout"]["parameters"]
    for stage in () if options.keep else recipe.STAGES:
        shutil.rmtree(output / f"llava-{stage}", ignore_errors=True)
    made = made_by(flags, options.seed, options.steps, options.device)
    write(output / "details.json", json.dumps({"made": made, **details}))
