"""A control: the query map alone, whitened, so that a projector has nothing to gain from a better scale."""

from pathlib import Path
from typing import Any, Callable

import torch

from .probe import tower_and_pictures

PICTURES = 500


@torch.no_grad()
def fit_whitening(world: Path, file: Path) -> None:
    """Write the mean and the whitening matrix of hidden_states[-2] over training pictures."""
    model, _, pixels = tower_and_pictures(world, "pretrain", PICTURES)
    features = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    matrix = vectors @ torch.diag((values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
    torch.save({"mean": features.mean(0), "matrix": matrix}, file)


def whitened(file: Path, function: Callable, *arguments: Any) -> Any:
    """What function(*arguments) returns while LLaVA's tower whitens what it selects; for a process of its own."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    kept, select = torch.load(file, map_location="cpu"), CLIPVisionTower.feature_select

    def feature_select(self, outputs):
        features = select(self, outputs)
        mean, matrix = (kept[name].to(features.device) for name in ("mean", "matrix"))
        return ((features.float() - mean) @ matrix).to(features.dtype)

    CLIPVisionTower.feature_select = feature_select
    return function(*arguments)
