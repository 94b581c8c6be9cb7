"""What a linear probe reads from each map of a tower: where the detail is, and where it is lost."""

import json
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from PIL import Image

from .models import embed, run_blocks
from .pictures import LIGHTS, PLACES, QUESTIONS

TRAIN, HELDOUT = 2000, 400  # pictures


def tower_and_pictures(world: Path, split: str, count: int):
    """The world's tower, and the first pictures of a split: their records and pixels."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    records = json.loads((world / "data" / f"{split}.json").read_text())[:count]
    images = [Image.open(world / "data" / record["image"]) for record in records]
    pixels = CLIPImageProcessor.from_pretrained(world / "clip")(images, return_tensors="pt").pixel_values
    return CLIPVisionModel.from_pretrained(world / "clip"), records, pixels


@torch.no_grad()
def probe(world: Path) -> List[Dict[str, float]]:
    """Per hidden_states index up to LLaVA's -2: the fraction of held-out numbers, places and lights that a patch tells.

    Number and place are read at the patch in the number's middle, the light at the patch in the middle of the picture,
    by ridge regression on standardised features, fitted on training pictures.
    """
    splits = []
    for name, count in (("pretrain", TRAIN), ("heldout", HELDOUT)):
        model, records, pixels = tower_and_pictures(world, name, count)
        splits.append((records, embed(model, pixels)))
    accuracies = []
    for layer in range(model.config.num_hidden_layers):
        if layer:
            splits = [(records, run_blocks(model, hidden, layer - 1, layer)) for records, hidden in splits]
        accuracies.append({kind: _read(kind, model, *splits) for kind in QUESTIONS})
    return accuracies


def _read(kind: str, model, train, heldout) -> float:
    (features, labels), (unseen, wanted) = (_examples(kind, model, *split) for split in (train, heldout))
    mean, deviation = features.mean(0), features.std(0) + 1e-5
    features, unseen = (features - mean) / deviation, (unseen - mean) / deviation
    targets = torch.nn.functional.one_hot(labels).float()
    normal = features.T @ features + 10 * torch.eye(features.shape[1])
    weights = torch.linalg.solve(normal, features.T @ (targets - targets.mean(0)))
    return (unseen @ weights).argmax(1).eq(wanted).float().mean().item()


def _examples(kind: str, model, records: Sequence[dict], hidden: torch.Tensor):
    """One patch per picture [len(records), C], and what it should tell."""
    patch = model.config.patch_size
    side = model.config.image_size // patch
    rows = torch.full((len(records), 2), side // 2)  # y, x
    if kind != "light":
        boxes = torch.tensor([record["box"] for record in records])
        rows = torch.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], 1) // (2 * patch)
    names = {"number": range(10), "place": PLACES, "light": LIGHTS}[kind]
    labels = [names.index(record[kind]) for record in records]
    index = 1 + rows[:, 0] * side + rows[:, 1]  # CLS is the first token
    return hidden[torch.arange(len(records)), index], torch.tensor(labels)
