"""Feature maps of one picture: the fuser's inputs, its output, and the samples of one query."""

from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from PIL import Image

from ..hidden_states import capture_layers
from .reading import Model

Box = Tuple[float, float, float, float]  # left, top, right, bottom


class FeatureMaps(NamedTuple):
    """Arrays of one picture, without CLS; H and W are the rows and columns of the tower's grid."""

    picture: Image.Image
    label: str  # of the model
    indices: Tuple[int, ...]  # of hidden_states, the query last
    box: Box  # edges of the tower's input, in pixels of the picture; beyond the picture it holds padding
    layers: np.ndarray  # [L, H, W, C]
    fused: Optional[np.ndarray]  # [H, W, C]; None where the fuser returns no map like the query's
    at: Optional[Tuple[float, float]] = None  # the chosen point, in pixels of the picture
    cell: Optional[Tuple[int, int]] = None  # row and column of the query at that point
    samples: Optional[np.ndarray] = None  # [heads, levels, points, 2], x and y in pixels of the picture
    weights: Optional[np.ndarray] = None  # [heads, levels, points]; those of a head sum to 1

    @property
    def difference(self) -> Optional[np.ndarray]:
        """fused - query [H, W, C], or None."""
        return None if self.fused is None else self.fused - self.layers[-1]

    @property
    def real(self) -> np.ndarray:
        """Which cells touch the picture, bool [H, W]; the others are padding alone."""
        spans = zip(self.box[:2], self.box[2:], self.layers.shape[2:0:-1], self.picture.size)
        lines = [(np.linspace(start, end, count + 1), size) for start, end, count, size in spans]
        columns, rows = ((line[1:] > 1e-6) & (line[:-1] < size - 1e-6) for line, size in lines)
        return rows[:, None] & columns

    def arrays(self) -> Dict[str, np.ndarray]:
        """For ``--npz``: every field but picture and label, and ``difference`` and ``real``."""
        found = {name: getattr(self, name) for name in self._fields if name not in ("picture", "label")}
        found.update(difference=self.difference, real=self.real)
        return {name: np.asarray(value) for name, value in found.items() if value is not None}


@torch.no_grad()
def feature_maps(model: Model, picture: Image.Image, at: Optional[Tuple[float, float]] = None) -> FeatureMaps:
    """Compute all maps of one RGB picture, and the samples of the query at the point (x, y) in its pixels."""
    if at is not None and not (0 <= at[0] < picture.width and 0 <= at[1] < picture.height):
        width, height = picture.size
        raise ValueError(f"--at {at[0]:g},{at[1]:g} lies outside the picture of {width} x {height} pixels")
    pixels, box = preprocess(picture, model.processor, model.aspect_ratio)
    size = model.tower.config.image_size
    if tuple(pixels.shape[2:]) != (size, size):
        raise ValueError(f"the tower's processor makes {tuple(pixels.shape[2:])} pixels, but the tower takes {size}")
    side = size // model.tower.config.patch_size
    cell = None if at is None else _cell(at, box, side)
    indices = model.settings.layers
    flat = capture_layers(model.tower, pixels.to(model.tower.device), indices, "patch")  # [1, N, L*C]
    layers = flat.unflatten(-1, (len(indices), -1)).unbind(-2)
    fused = model.fuser(layers)
    fused = fused.reshape(side, side, -1).cpu().numpy() if fused.shape == layers[-1].shape else None
    grids = torch.cat(layers).unflatten(1, (side, side)).cpu().numpy()
    maps = FeatureMaps(picture, model.label, indices, box, grids, fused, at, cell)
    found = None if cell is None else model.fuser.samples(layers)
    if cell is None or found is None:
        return maps
    places, weights = (of_all[0, cell[0] * side + cell[1]].cpu().numpy() for of_all in found)
    samples = box[:2] + (places + 0.5) / side * (np.array(box[2:]) - box[:2])
    return maps._replace(samples=samples.astype(np.float32), weights=weights)


def preprocess(picture: Image.Image, processor: Any, aspect_ratio: Optional[str]) -> Tuple[torch.Tensor, Box]:
    """An RGB picture as LLaVA gives it to its tower: [1, 3, size, size], and its edges in pixels of the picture.

    Args:
        aspect_ratio: ``pad`` makes the picture square with bars of the mean colour. ``anyres`` squeezes it, as the
            overview of LLaVA-1.6. Otherwise the processor crops the middle.
    """
    width, height = picture.size
    box = np.array([0.0, 0.0, width, height])
    if aspect_ratio == "pad" and width != height:
        side = max(width, height)
        x, y = (side - width) // 2, (side - height) // 2
        padded = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        padded.paste(picture, (x, y))
        picture, box = padded, np.array([-x, -y, side - x, side - y], dtype=float)
    elif aspect_ratio == "anyres":
        side = processor.size.get("shortest_edge") or processor.size["height"]
        picture = picture.resize((side, side))
    pixels = processor.preprocess(picture, return_tensors="pt").pixel_values
    whole = processor.preprocess(picture, return_tensors="pt", do_center_crop=False).pixel_values
    after, before = np.array(pixels.shape[:1:-1]), np.array(whole.shape[:1:-1])  # width and height, cropped and not
    # A picture smaller than the crop gets a border instead.
    start = np.where(before >= after, (before - after) // 2, -((after - before) // 2))
    scale = (box[2:] - box[:2]) / before
    return pixels, (*(box[:2] + start * scale), *(box[:2] + (start + after) * scale))


def _cell(at: Tuple[float, float], box: Box, side: int) -> Tuple[int, int]:
    """Row and column of the cell at a point."""
    column, row = (int(np.floor((at[i] - box[i]) / (box[i + 2] - box[i]) * side)) for i in (0, 1))
    if not (0 <= row < side and 0 <= column < side):
        left, top, right, bottom = (round(float(edge), 1) for edge in box)
        raise ValueError(
            f"--at {at[0]:g},{at[1]:g} is cut off before the tower sees it; "
            f"choose x from {left:g} to {right:g} and y from {top:g} to {bottom:g}"
        )
    return row, column
