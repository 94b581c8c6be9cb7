"""A tower that forgets numbers, for LLaVA with and without the fuser: LLaVA's own train.py, the same data and steps."""

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List

from housekeeping import exit_on_signals, padded
from toy import arm, asking, recipe
from toy.pictures import CHANCE, QUESTIONS
from toy.probe import probe
from toy.world import SIZES, make_world

VARIANTS = {  # name -> flags
    "mlp2x_gelu": "--mm_projector_type mlp2x_gelu",
    "mlp2x_gelu, layer 4": "--mm_projector_type mlp2x_gelu --mm_vision_select_layer 4",
    "mmfuser": "--mm_projector_type mmfuser --mm_fuser_num_heads 4 --mm_fuser_num_points 2 --mm_fuser_lr 1e-2",
}
SHUT = "mmfuser, gates at 0"
COLOURS = {"mlp2x_gelu": "tab:blue", "mlp2x_gelu, layer 4": "tab:cyan", "mmfuser": "tab:orange", SHUT: "0.6"}


def compare(folder: Path, options: argparse.Namespace, say: Callable[..., None]) -> Dict[str, dict]:
    """Train and question every variant; its losses, answers and accuracies, and those with the gates at zero."""
    records = json.loads((folder / "data" / "heldout.json").read_text())
    results: Dict[str, dict] = {}
    for variant, text in VARIANTS.items():
        flags, output = text.split(), folder / variant.replace(", ", "-").replace(" ", "")
        steps = [options.pretrain_steps, options.finetune_steps]
        result = arm.train(folder, output, flags, steps, options.seed, say=partial(say, variant))
        say(variant, f"answering {len(QUESTIONS) * len(records)} questions about held-out pictures")
        shut = variant == "mmfuser"
        results[variant] = {**result, **arm.ask(folder, output, flags, "heldout", shut=shut)}
        if shut:
            results[SHUT] = {"answers": results[variant].pop("shut")}
    for result in results.values():
        result["accuracy"] = asking.accuracy(result["answers"], records)
    return results


def probe_table(probes: List[Dict[str, float]]) -> str:
    rows = [[kind, *(f"{100 * layer[kind]:.0f}" for layer in probes)] for kind in probes[0]]
    text = padded([["hidden_states", *map(str, range(len(probes)))], *rows])
    return "\n".join([*text, "Percent right, of what a linear probe reads from one patch; LLaVA takes the last."])


def result_table(results: Dict[str, dict]) -> str:
    rows = [["right (%)", *QUESTIONS, "train seconds"]]
    for variant, result in {"guessing": {"accuracy": CHANCE}, **results}.items():
        seconds = f"{result['seconds']:.0f}" if "seconds" in result else ""
        rows.append([variant, *(f"{100 * result['accuracy'][kind]:.1f}" for kind in QUESTIONS), seconds])
    return "\n".join(padded(rows))


def draw(folder: Path, results: Dict[str, dict], probes: List[Dict[str, float]], file: Path, pictures: int = 6) -> None:
    """What the probe reads and what the models answer; below, the first held-out pictures with their answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    records = json.loads((folder / "data" / "heldout.json").read_text())[:pictures]
    figure = plt.figure(figsize=(14, 10))
    left, right = figure.add_gridspec(1, 2, left=0.06, right=0.98, bottom=0.68, top=0.95, wspace=0.15).subplots()
    for kind, style in zip(probes[0], ("-", ":", "--")):
        left.plot([100 * layer[kind] for layer in probes], style, marker="o", color="black", label=kind)
    left.set(title="What a linear probe reads from one patch", xlabel="hidden_states", ylabel="right (%)")
    left.set_ylim(0, 100)
    left.axvline(len(probes) - 1, color="0.8", zorder=0)
    left.annotate("LLaVA's map", (len(probes) - 1.05, 4), ha="right", color="0.5")
    left.legend()
    width = 0.8 / len(results)
    for index, (variant, result) in enumerate(results.items()):
        places = [place + (index - (len(results) - 1) / 2) * width for place in range(len(QUESTIONS))]
        shares = [100 * result["accuracy"][kind] for kind in QUESTIONS]
        bars = right.bar(places, shares, width, color=COLOURS[variant], label=variant)
        right.bar_label(bars, fmt="%.0f", fontsize=8)
    for place, kind in enumerate(QUESTIONS):
        look = dict(color="black", linestyle=":", label="guessing" if place == 0 else None)
        right.plot([place - 0.45, place + 0.45], [100 * CHANCE[kind]] * 2, **look)
    asked = len(results["mmfuser"]["answers"]["number"])
    right.set(title=f"Right answers about {asked} held-out pictures (%)", ylim=(0, 108))
    right.set_xticks(range(len(QUESTIONS)), list(QUESTIONS.values()))
    right.legend(loc="upper left")
    lower = figure.add_gridspec(1, len(records), left=0.02, right=0.98, bottom=0.39, top=0.6, wspace=0.1)
    for index, (axis, record) in enumerate(zip(lower.subplots(squeeze=False)[0], records)):
        axis.imshow(Image.open(folder / "data" / record["image"]))
        axis.axis("off")
        y = -0.06
        for kind, question in QUESTIONS.items():
            lines = [(question, "black", "bold"), (f"expected: {record[kind]}", "black", "normal")]
            for variant, result in results.items():
                given = result["answers"][kind][index]
                colour = "tab:green" if given == str(record[kind]) else "tab:red"
                lines.append((f"{variant.split(', ')[-1]}: {textwrap.shorten(given, 20)}", colour, "normal"))
            for text, colour, weight in lines:
                axis.text(0, y, text, color=colour, weight=weight, fontsize=9, va="top", transform=axis.transAxes)
                y -= 0.09
            y -= 0.04
    figure.savefig(file, dpi=100)


def show_maps(folder: Path, output: Path) -> None:
    """The feature maps of the first held-out picture, at its number, as a user would ask for them."""
    record = json.loads((folder / "data" / "heldout.json").read_text())[0]
    left, top, right, bottom = record["box"]
    model, at = folder / "mmfuser" / "llava-finetune", f"{(left + right) // 2},{(top + bottom) // 2}"
    arguments = ["--model-path", model, "--image", folder / "data" / record["image"], "--at", at, "--output", output]
    subprocess.run([sys.executable, "-m", "llava_mmfuser", "visualize", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".demo"))
    for name, (default, text) in {**SIZES, **recipe.STEPS}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elapsed", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    exit_on_signals()
    start = time.monotonic() - options.elapsed

    def say(*parts: str) -> None:
        print(f"\n== [{time.monotonic() - start:3.0f}s] {': '.join(parts)}", flush=True)

    folder = options.output.resolve() / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_world(folder, {name: getattr(options, name) for name in SIZES}, options.seed, say)
    say("Probing the tower: which map holds what")
    probes = probe(folder)
    print(probe_table(probes))
    results = compare(folder, options, say)
    say("Result")
    print(result_table(results))
    (folder / "results.json").write_text(json.dumps({"probes": probes, **results}, indent=1))
    picture = options.output.resolve() / "demo.png"
    draw(folder, results, probes, picture)
    print(f"Picture: {picture}")
    say("Feature maps of the first held-out picture")
    show_maps(folder, options.output.resolve() / "maps")
    say("Done")


if __name__ == "__main__":
    main()
