"""One run of the study: pretrain, finetune, ask about held-out pictures. scripts/study.py starts it in a process."""

import argparse
import functools
import json
import os
import shutil
from pathlib import Path
from typing import List, Sequence, Tuple

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


def train(options: argparse.Namespace, flags: Sequence[str]) -> dict:
    """Both stages through LLaVA's train.py.

    Returns:
        `losses` and `gates`, by stage; `seconds`, of the processor where there is no GPU.
    """
    toy, flags = toy_flags(flags)
    whiten = functools.partial(whitening.whitened, options.world / WHITENING, recipe.run_train_py)
    given = {**recipe.DEMO, "use_cpu": options.device == "cpu"}
    steps = dict(zip(recipe.STAGES, options.steps))
    if toy.toy_released:
        given["model_name_or_path"] = options.world / RELEASED
        steps = {"finetune": sum(options.steps)}
    found = {"losses": {}, "gates": {}, "seconds": 0.0}
    for stage in steps:
        output, log = options.output / f"llava-{stage}", options.output / f"{stage}.log"
        arguments = recipe.train_arguments(options.world, output, stage, **given, max_steps=steps[stage]) + flags
        if stage == "finetune" and toy.toy_finetune_rate:
            arguments += ["--learning_rate", toy.toy_finetune_rate]
        seconds, processor = recipe.train(arguments, options.seed, log, whiten if toy.toy_whiten else None)
        given["pretrain_mm_mlp_adapter"] = output / "mm_projector.bin"
        found["seconds"] += processor if options.device == "cpu" else seconds
        found["losses"][stage] = recipe.curve(output, "loss")
        found["gates"][stage] = recipe.curve(output, "mm_fuser_cross_gate")
    return found


def ask(options: argparse.Namespace, flags: Sequence[str]) -> dict:
    """Ask the trained model about the pictures that it did not train on.

    Returns:
        `right`, by split and kind of question a 0 or 1 per picture; `parameters` of the projector.
    """
    answer, data = asking.answer, options.world / "data"
    if toy_flags(flags)[0].toy_whiten:
        answer = functools.partial(whitening.whitened, options.world / WHITENING, answer)
    right = {}
    for split in ("validation", "heldout"):
        records = json.loads((data / f"{split}.json").read_text())
        model, log = options.output / "llava-finetune", options.output / f"{split}.log"
        found = recipe.in_child(answer, model, data, records, options.device, log=log)
        right[split] = asking.right(found["answers"], records)
    return {"right": right, "parameters": found["parameters"]}


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
    options.output.mkdir(parents=True, exist_ok=True)
    details = {**train(options, flags), **ask(options, flags)}
    for stage in () if options.keep else recipe.STAGES:
        shutil.rmtree(options.output / f"llava-{stage}", ignore_errors=True)
    made = made_by(flags, options.seed, options.steps, options.device)
    write(options.output / "details.json", json.dumps({"made": made, **details}))
