"""LLaVA's scripts/v1_5 recipe at toy size, run by LLaVA's own train.py."""

import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
}

# What LLaVA imports at its first optimizer (torch._dynamo) and as it saves (deepspeed) is there from the start.
PRELOADED = ["llava.train.train", "llava.model.builder", "torch._dynamo", "deepspeed"]
STAGES = ("pretrain", "finetune")
STEPS = {"pretrain_steps": (150, "steps of stage 1"), "finetune_steps": (250, "steps of stage 2")}
DEMO = {"per_device_train_batch_size": 16, "learning_rate": 2e-3, "model_max_length": 512}


SETTINGS = dict(  # of both stages
    part.split("=")
    for part in (
        "mm_projector_type=mmfuser mm_vision_select_layer=-2 mm_use_im_start_end=False mm_use_im_patch_token=False "
        "bf16=True use_cpu=True num_train_epochs=1 per_device_train_batch_size=4 gradient_accumulation_steps=1 "
        "save_strategy=no weight_decay=0.0 warmup_ratio=0.03 lr_scheduler_type=cosine logging_steps=1 "
        "model_max_length=256 dataloader_num_workers=0 lazy_preprocess=True report_to=none"
    ).split()
)


def train_py() -> Path:
    """LLaVA's own train.py, found without importing it."""
    return Path(importlib.util.find_spec("llava").origin).parent / "train" / "train.py"


def train_arguments(world: Path, output: Path, stage: str = "pretrain", **options: Any) -> List[str]:
    """What scripts/v1_5/pretrain.sh or finetune.sh pass to train.py, with tiny sizes.

    Args:
        world: a folder with `data`, `llama` and `clip`; see `pictures.make_dataset` and `models`.
        output: where the model goes.
        stage: ``pretrain`` or ``finetune``.
        options: flags to override or add; None drops one.
    """
    pretrain = stage == "pretrain"
    flags = {**SETTINGS, "version": "plain" if pretrain else "v1", "learning_rate": 1e-3 if pretrain else 2e-4}
    flags.update(model_name_or_path=world / "llama", vision_tower=world / "clip", image_folder=world / "data")
    flags.update(data_path=world / "data" / f"{stage}.json", tune_mm_mlp_adapter=pretrain, output_dir=output)
    if not pretrain:
        flags.update(image_aspect_ratio="pad", group_by_modality_length=True)
    flags.update(options)
    return [str(part) for name, value in flags.items() if value is not None for part in (f"--{name}", value)]


def train(arguments: List[str], seed: int, log: Path, run: Optional[Callable] = None) -> Tuple[float, float]:
    """Run train.py with these arguments; its output goes to `log`, its progress is shown.

    train.py makes the projector before its Trainer applies --seed, so that torch is seeded here, too. `run` stands for
    `run_train_py` in the child.

    Returns:
        Seconds, and seconds of processor time.

    Raises:
        RuntimeError: train.py failed; the message ends with the last lines of `log`.
    """
    start = time.monotonic()
    processor = in_child(run or run_train_py, [*arguments, "--seed", str(seed)], seed, log=log)
    return time.monotonic() - start, processor


def run_train_py(arguments: List[str], seed: int) -> float:
    """LLaVA's train.py in this process, once; the processor time that it took."""
    import torch

    sys.argv = [str(train_py()), *arguments]
    torch.manual_seed(seed)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return time.process_time()


def in_child(function: Callable, *arguments: Any, log: Path) -> Any:
    """What function(*arguments) returns in a fresh process, forked from one that has LLaVA and torch imported.

    Raises:
        RuntimeError: it raised or was killed; the message ends with the last lines of `log`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    log.write_bytes(b"")
    child = context.Process(target=_call, args=(function, arguments, log, sender), daemon=True)
    child.start()
    sender.close()
    shown = ""
    try:
        while not receiver.poll(0.5):  # also true where the child ended without a result
            last = _progress(log)
            if last not in ("", shown):
                shown = last
                print("\r" + shown, end="", flush=True)
        if shown:
            print(flush=True)
        result = receiver.recv()
        child.join(10)  # in which it tidies up
        return result
    except EOFError:
        child.join()
        tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-25:]
        raise RuntimeError("\n".join([f"exit status {child.exitcode}; the last lines of {log}:", *tail])) from None
    finally:
        child.kill()


def _progress(log: Path) -> str:
    """The last state of the last progress bar in `log`."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        bars = re.findall(r"[^\r\n]*\d(?:it/s|s/it)\]", file.read().decode(errors="replace"))
    return bars[-1].strip() if bars else ""


def _call(function: Callable, arguments: tuple, log: Path, sender: Any) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # transformers 4.37 looks up Pillow's eleven times per picture, each time in a file
    importlib.metadata.version = functools.lru_cache(maxsize=None)(importlib.metadata.version)
    try:
        result = function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sender.send(result)


def curve(output: Path, name: str) -> List[float]:
    """What the Trainer logged under `name`, step by step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def final(values: List[float]) -> float:
    """The mean of the last ten: one step of 16 pictures is too noisy to compare."""
    return sum(values[-10:]) / len(values[-10:])
