"""Pictures, vision tower and language model in one folder: all that LLaVA's train.py needs."""

from pathlib import Path
from typing import Callable, Dict

SIZES = {  # default and meaning of each size
    "pictures": (3000, "training pictures"),
    "heldout": (400, "held-out pictures"),
    "validation": (0, "pictures to tune on, apart from both"),
    "read_steps": (500, "steps that teach the tower's shallow half to read"),
    "forget_steps": (600, "steps that teach its deep half to forget"),
    "llama_steps": (300, "steps that train the language model on text"),
}


def make_world(folder: Path, sizes: Dict[str, int], seed: int, say: Callable[[str], None]) -> None:
    """Write `data`, `clip` and `llama` below `folder`.

    Args:
        folder: the world.
        sizes: a value for each of `SIZES`.
        seed: of everything.
        say: is told what is made.
    """
    from . import models, pictures

    say(f"Making {sizes['pictures']} training and {sizes['heldout']} held-out pictures")
    counts = sizes["pictures"], sizes["heldout"], sizes["validation"]
    pictures.make_dataset(folder / "data", *counts, image_size=64, digit_size=24, seed=seed)
    say(f"Training the vision tower: {sizes['read_steps']} steps to read, {sizes['forget_steps']} to forget")
    steps = sizes["read_steps"], sizes["forget_steps"]
    models.make_clip(folder / "clip", image_size=64, patch_size=8, pictures=folder / "data", steps=steps, seed=seed)
    say(f"Training the language model on text, {sizes['llama_steps']} steps")
    models.make_llama(folder / "llama", steps=sizes["llama_steps"], seed=seed)
