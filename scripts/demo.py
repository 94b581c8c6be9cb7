"""Compare mlp2x_gelu and mmfuser in a tiny LLaVA: LLaVA's own train.py and loader, same data, seeds and steps."""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Dict, List, Sequence

import tiny_llava
import torch
import transformers
from PIL import Image
from tqdm import tqdm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VARIANTS = ("mlp2x_gelu", "mmfuser")
COLOURS = {"mlp2x_gelu": "tab:blue", "mmfuser": "tab:orange"}


class Progress:
    """Step headers with the seconds since demo.sh started."""

    def __init__(self, elapsed: float):
        self.start = time.monotonic() - elapsed

    def __call__(self, text: str) -> None:
        print(f"\n== [{time.monotonic() - self.start:3.0f}s] {text}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".demo"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--pictures", type=int, default=3000, help="training pictures")
    parser.add_argument("--heldout", type=int, default=200, help="held-out pictures")
    parser.add_argument("--clip-steps", type=int, default=600, help="steps that train the vision tower")
    parser.add_argument("--llama-steps", type=int, default=400, help="steps that train the language model on text")
    parser.add_argument("--pretrain-steps", type=int, default=120)
    parser.add_argument("--finetune-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elapsed", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_world(folder: Path, options: argparse.Namespace, progress: Progress) -> None:
    """Write pictures, vision tower and language model below `folder`."""
    progress(f"Making {options.pictures} training and {options.heldout} held-out pictures")
    tiny_llava.make_dataset(
        folder / "data", options.pictures, options.heldout, image_size=64, digit_size=24, seed=options.seed
    )
    progress(f"Training the vision tower on the training pictures, {options.clip_steps} steps")
    tiny_llava.make_clip(
        folder / "clip",
        image_size=64,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=8,
        pictures=folder / "data",
        steps=options.clip_steps,
        seed=options.seed,
    )
    progress(f"Training the language model on text, {options.llama_steps} steps")
    tiny_llava.make_llama(folder / "llama", steps=options.llama_steps, seed=options.seed)


def train_command(
    world: Path,
    folder: Path,
    variant: str,
    stage: str,
    options: argparse.Namespace,
    device: str = "cpu",
    flags: Sequence[str] = (),
) -> List[str]:
    """LLaVA's scripts/v1_5/pretrain.sh or finetune.sh without the deepspeed launcher, with tiny sizes.

    `world` is what `make_world` wrote, the model goes below `folder`, and further `flags` override those made here.
    train.py makes the projector before its Trainer applies --seed: alone it starts from other weights in every run.
    """
    script = importlib.util.find_spec("llava.train.train").origin
    seeded = f"import runpy, torch; torch.manual_seed({options.seed}); runpy.run_path({script!r}, run_name='__main__')"
    recipe: Dict[str, object] = {
        "model_name_or_path": world / "llama",
        "vision_tower": world / "clip",
        "mm_projector_type": variant,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "data_path": world / "data" / f"{stage}.json",
        "image_folder": world / "data",
        "lazy_preprocess": True,
        "output_dir": folder / f"llava-{variant}-{stage}",
        "bf16": True,
        "use_cpu": device == "cpu",
        "seed": options.seed,
        "max_steps": options.pretrain_steps if stage == "pretrain" else options.finetune_steps,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 512,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    simple_fusion = any(name == "--mm_fuser_fusion" and value != "mmfuser" for name, value in zip(flags, flags[1:]))
    if variant == "mmfuser" and not simple_fusion:  # which has no heads
        recipe["mm_fuser_num_heads"] = 4
    if stage == "pretrain":
        recipe.update(version="plain", tune_mm_mlp_adapter=True, learning_rate=2e-3)
    else:
        recipe.update(
            version="v1",
            image_aspect_ratio="pad",
            group_by_modality_length=True,
            learning_rate=2e-3,
            pretrain_mm_mlp_adapter=folder / f"llava-{variant}-pretrain" / "mm_projector.bin",
        )
    arguments = [part for name, value in recipe.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-c", seeded, *arguments, *flags]


def run(command: List[str], log: Path) -> float:
    """Run `command`, pass on its progress bar, keep its output in `log`; return the seconds. Failing ends the demo."""
    environment = dict(os.environ, WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    start = time.monotonic()
    rest = last = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process, open(
        log, "wb"
    ) as file:
        for chunk in iter(lambda: process.stdout.read1(65536), b""):
            file.write(chunk)
            *lines, rest = (rest + chunk).replace(b"\n", b"\r").split(b"\r")
            shown = [line for line in lines + [rest] if b"it/s]" in line or b"s/it]" in line]
            if shown and shown[-1] != last:
                last = shown[-1]
                print("\r" + last.decode(errors="replace").strip(), end="", flush=True)
    print(flush=True)
    if process.returncode:
        tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-25:]
        sys.exit(
            "\n".join(
                [
                    "",
                    f"demo: exit status {process.returncode} from",
                    shlex.join(command),
                    f"last lines of {log}:",
                    *tail,
                ]
            )
        )
    return time.monotonic() - start


def answer(folder: Path, data: Path, records: List[dict], device: str = "cpu") -> Dict[str, object]:
    """Load the model through LLaVA and ask both questions about every record, as llava/eval/model_vqa.py does."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    transformers.logging.set_verbosity_error()  # else it lists the tower's weights, and the pad token at every question
    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder), None, get_model_name_from_path(str(folder)), device_map=device, device=device
    )
    answers: Dict[str, List[str]] = {kind: [] for kind in tiny_llava.QUESTIONS}
    for record in tqdm(records, desc="pictures", mininterval=1):
        image = Image.open(data / record["image"]).convert("RGB")
        pixels = process_images([image], processor, model.config)[0].unsqueeze(0).half().to(device)
        for kind, question in tiny_llava.QUESTIONS.items():
            conversation = conv_templates["v1"].copy()
            conversation.append_message(conversation.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + question)
            conversation.append_message(conversation.roles[1], None)
            ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(
                    ids.unsqueeze(0).to(device),
                    images=pixels,
                    image_sizes=[image.size],
                    do_sample=False,
                    max_new_tokens=32,
                    use_cache=True,
                )
            answers[kind].append(tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip())
    parameters = sum(parameter.numel() for parameter in model.get_model().mm_projector.parameters())
    return {"answers": answers, "parameters": parameters}


def losses(folder: Path) -> List[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def accuracy(answers: Dict[str, List[str]], records: List[dict]) -> Dict[str, float]:
    """Per kind of question, the fraction of answers that are exactly what the record says."""
    return {
        kind: sum(text == str(record[kind]) for text, record in zip(given, records)) / len(records)
        for kind, given in answers.items()
    }


def compare(folder: Path, options: argparse.Namespace, progress: Progress) -> Dict[str, dict]:
    """Train and examine every variant; return its losses, answers, accuracies, projector size and seconds."""
    records = json.loads((folder / "data" / "heldout.json").read_text())
    results = {}
    for variant in options.variants:
        result: Dict[str, object] = {"losses": {}, "seconds": 0.0}
        for stage in ("pretrain", "finetune"):
            progress(f"{variant}: {stage}, LLaVA's train.py")
            output = folder / f"llava-{variant}-{stage}"
            shutil.rmtree(output, ignore_errors=True)
            log = folder / f"llava-{variant}-{stage}.log"
            result["seconds"] += run(train_command(folder, folder, variant, stage, options), log)
            result["losses"][stage] = losses(output)
        progress(f"{variant}: answering {2 * len(records)} questions about held-out pictures")
        result.update(answer(output, folder / "data", records))
        result["accuracy"] = accuracy(result["answers"], records)
        print(", ".join(f"{kind}: {value:.1%} right" for kind, value in result["accuracy"].items()), flush=True)
        results[variant] = result
    return results


def final_loss(curve: List[float]) -> float:
    """The mean of the last ten steps: one step of 16 pictures is too noisy to compare."""
    return sum(curve[-10:]) / len(curve[-10:])


def print_table(results: Dict[str, dict]) -> None:
    rows = [["", "pretrain loss", "finetune loss", "number right", "place right", "projector", "train seconds"]]
    for variant, result in results.items():
        rows.append(
            [
                variant,
                *(f"{final_loss(result['losses'][stage]):.3f}" for stage in ("pretrain", "finetune")),
                *(f"{result['accuracy'][kind]:.1%}" for kind in ("number", "place")),
                f"{result['parameters']:,}",
                f"{result['seconds']:.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    print("Loss: mean of the last 10 steps. Right: held-out pictures; guessing gives 10.0% (number) and 11.1% (place).")


def draw(folder: Path, results: Dict[str, dict], file: Path, pictures: int = 6) -> None:
    """Loss curves above; below, the first held-out pictures with the expected and the given answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = json.loads((folder / "data" / "heldout.json").read_text())[:pictures]
    figure = plt.figure(figsize=(14, 9))
    upper = figure.add_gridspec(1, 2, left=0.06, right=0.98, bottom=0.6, top=0.95)
    for axis, stage in zip(upper.subplots(), ("pretrain", "finetune")):
        for variant, result in results.items():
            curve = torch.tensor(result["losses"][stage])
            window = min(10, len(curve))
            smooth = curve.unfold(0, window, 1).mean(-1)
            axis.plot(range(1, len(curve) + 1), curve, color=COLOURS[variant], alpha=0.25, linewidth=1)
            axis.plot(range(window, len(curve) + 1), smooth, color=COLOURS[variant], label=variant, linewidth=2)
        axis.set(title=f"{stage} loss (bold: mean of {window} steps)", xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    lower = figure.add_gridspec(1, len(records), left=0.02, right=0.98, bottom=0.22, top=0.45, wspace=0.1)
    for index, (axis, record) in enumerate(zip(lower.subplots(squeeze=False)[0], records)):
        axis.imshow(Image.open(folder / "data" / record["image"]))
        axis.axis("off")
        y = -0.05
        for kind, question in tiny_llava.QUESTIONS.items():
            lines = [(question, "black", "bold"), (f"expected: {record[kind]}", "black", "normal")]
            for variant, result in results.items():
                given = result["answers"][kind][index]
                colour = "tab:green" if given == str(record[kind]) else "tab:red"
                lines.append((f"{variant}: {textwrap.shorten(given, 20)}", colour, "normal"))
            for text, colour, weight in lines:
                axis.text(0, y, text, color=colour, weight=weight, fontsize=9.5, va="top", transform=axis.transAxes)
                y -= 0.1
            y -= 0.05
    summary = ";   ".join(
        "{}: number {number:.0%}, place {place:.0%}".format(variant, **result["accuracy"])
        for variant, result in results.items()
    )
    asked = len(next(iter(results.values()))["answers"]["number"])
    figure.text(0.5, 0.48, f"Right answers on {asked} held-out pictures:   {summary}", ha="center", fontsize=12)
    figure.savefig(file, dpi=110)


def main() -> None:
    options = parse_arguments()
    progress = Progress(options.elapsed)
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output.resolve() / "run"
    shutil.rmtree(folder, ignore_errors=True)
    make_world(folder, options, progress)
    results = compare(folder, options, progress)
    progress("Result")
    print_table(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    picture = options.output.resolve() / "demo.png"
    draw(folder, results, picture)
    print(f"Picture: {picture}")
    progress("Done")


if __name__ == "__main__":
    main()
