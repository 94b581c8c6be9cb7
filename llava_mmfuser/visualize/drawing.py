"""Draws feature maps as a figure. Needs matplotlib."""

import textwrap
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .maps import FeatureMaps

DEVIATIONS = 2  # from the middle to the end of a colour, in standard deviations of its principal component
PERCENTILES = (2, 98)  # of the norms, at the ends of their scale: a few patches in CLIP's deep layers are very long
SHOWN = 0.95  # share of the samples' weights in the window
CAPTION = (
    f"Colours: the three main components of a map's patches (LayerNormed, centred), ±{DEVIATIONS} standard deviations. "
    "Each layer has its own components, turned so that its colours match the query's as closely as they can; the fused "
    "map is shown in the query's.",
    "Difference: length of (fused - query) on its own scale; the number is the mean of its share of the query's "
    "length. Norm: length of a patch's feature vector; all maps share a scale from the "
    f"{PERCENTILES[0]}nd to the {PERCENTILES[1]}th percentile. Patches of padding alone count nowhere.",
)
SAMPLES_CAPTION = (
    "Samples: where the query in the white cell reads each layer, in the dashed window, which is as large as it takes "
    f"to hold {SHOWN:.0%} of the weights. A dot's colour is its head, its area its attention weight; the number is the "
    "layer's share of all weights. Grey is padding; in the white beyond there is nothing to read.",
)
WIDTH, HEIGHT, FLAT, NARROW = 1.6, 2.4, 0.3, 1.35  # inches: a panel's largest size, its least height and width
LEFT, RIGHT, TOP, TITLE, GAP = 0.75, 0.7, 0.4, 0.25, 0.12  # inches around panels
DPI = 160

Edges = Union[Sequence[float], np.ndarray]  # left, top, right, bottom


def colours(maps: FeatureMaps) -> List[np.ndarray]:
    """The layers, then the fused map if there is one, as RGB [H, W, 3] in 0 … 1; see `CAPTION`."""
    real = maps.real
    query, project = _components(maps.layers[-1], real)
    shown = []
    for layer in maps.layers[:-1]:
        scores, _ = _components(layer, real)
        left, _, right = np.linalg.svd(scores[real].T @ query[real])
        shown.append(scores @ (left @ right))
    shown += [query] + ([] if maps.fused is None else [project(maps.fused)])
    return [np.clip(0.5 + scores / (2 * DEVIATIONS), 0, 1) for scores in shown]


def _components(layer: np.ndarray, real: np.ndarray) -> Tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Scores [H, W, 3] of a map: its main components, in standard deviations over its real patches.

    Also returns the function that scores another map in the same components.
    """

    def normed(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    patches = normed(layer)[real]  # [n, C]
    mean = patches.mean(0)
    patches = patches - mean
    values, vectors = np.linalg.eigh(patches @ patches.T)  # [n, n] is cheaper to decompose than [n, C]
    values, vectors = values[:-4:-1], vectors[:, :-4:-1]
    kept = values > 1e-9 * max(values[0], 1e-9)  # fewer than three in a map without contrast
    basis = np.zeros((layer.shape[-1], 3))
    basis[:, : len(kept)] = patches.T @ vectors * np.where(kept, np.sqrt(len(patches)) / np.where(kept, values, 1), 0)
    basis *= np.where(basis[np.abs(basis).argmax(0), range(3)] < 0, -1, 1)  # a sign is arbitrary: always the same one

    def project(x: np.ndarray) -> np.ndarray:
        return (normed(x) - mean) @ basis

    return project(layer), project


class _Board:
    """A figure with a grid of panels: columns of one width, rows of these heights, in inches."""

    def __init__(self, columns: int, rows: Sequence[float], width: float, caption: Sequence[str]):
        self.width, self.rows = width, rows
        self.total = total = LEFT + columns * (width + GAP) + 2 * GAP + RIGHT
        lines = [line for text in caption for line in textwrap.wrap(text, int(total * 16))]
        self.height = TOP + sum(rows) + len(rows) * (TITLE + GAP) + 0.14 * len(lines) + 0.1
        self.figure = Figure(figsize=(total, self.height), dpi=DPI)
        self.figure.text(LEFT / total, 0.08 / self.height, "\n".join(lines), fontsize=7.5, color="0.3", va="bottom")

    def axes(self, column: int, row: int, left: float = 0.0, width: Optional[float] = None) -> Any:
        """Axes in a place of the grid, moved right by `left`."""
        x = LEFT + column * (self.width + GAP) + (2 * GAP if column else 0) + left
        y = TOP + sum(self.rows[: row + 1]) + (row + 1) * TITLE + row * GAP
        box = x / self.total, 1 - y / self.height, (width or self.width) / self.total, self.rows[row] / self.height
        return self.figure.add_axes(box)

    def bar(self, column: int, row: int, left: float, colouring: Any, label: str, **settings: Any) -> None:
        bar = self.figure.colorbar(colouring, cax=self.axes(column, row, left, 0.09), **settings)
        bar.set_label(label, fontsize=8, labelpad=2)
        bar.ax.tick_params(labelsize=7, length=2, pad=1)


def draw(maps: FeatureMaps, title: str) -> Any:
    """The matplotlib `Figure` of one picture's maps.

    The first row shows the picture and the maps in colours, the second the difference and the norms. With a chosen
    point, the third row shows its samples in each shallow layer. What the tower does not see is pale.
    """
    fields = [*maps.layers] + ([] if maps.fused is None else [maps.fused])
    names = [f"layer {index}" for index in maps.indices[:-1]] + [f"layer {maps.indices[-1]} = query", "fused"]
    scale = min(WIDTH / maps.picture.width, HEIGHT / maps.picture.height)
    height = max(maps.picture.height * scale, FLAT)
    if maps.samples is None:
        board = _Board(1 + len(fields), [height] * 2, max(NARROW, maps.picture.width * scale), CAPTION)
    else:
        board = _Board(1 + len(fields), [height, height, WIDTH], WIDTH, CAPTION + SAMPLES_CAPTION)
    text = f"{title}, {maps.picture.width} x {maps.picture.height}   |   {maps.label}"
    text = (text if text.isprintable() else ascii(text)[1:-1]).replace("$", r"\$")  # bytes that are no text: no glyphs
    board.figure.text(LEFT / board.total, 1 - 0.12 / board.height, text, fontsize=11, va="top")
    picture = board.axes(0, 0)
    _show_picture(picture, maps, alpha=0.3)
    _show_picture(picture, maps).set_clip_path(_rectangle(maps.box, transform=picture.transData))
    _frame(picture, maps, "picture" if maps.at is None else "picture, point {:g},{:g}".format(*maps.at))
    norms = [np.linalg.norm(field, axis=-1) for field in fields]
    low, high = np.percentile(np.stack([norm[maps.real] for norm in norms]), PERCENTILES)
    for column, (name, rgb, norm) in enumerate(zip(names, colours(maps), norms), 1):
        _map_panel(board.axes(column, 0), maps, name, rgb)
        text = f"norm, median {np.median(norm[maps.real]):.3g}"
        shown = _map_panel(board.axes(column, 1), maps, text, norm, cmap="viridis", vmin=low, vmax=high)
    board.bar(len(norms), 1, board.width + 0.08, shown, "norm", extend="both", ticks=MaxNLocator(4))
    if maps.difference is not None:
        size = np.linalg.norm(maps.difference, axis=-1)
        share = (size / norms[len(maps.layers) - 1].clip(1e-12))[maps.real].mean()
        text = f"difference, {share:.1%}" if size.any() else "difference, exactly 0"
        limit = np.percentile(size[maps.real], PERCENTILES[1]) or 1.0
        shown = _map_panel(board.axes(0, 1), maps, text, size, cmap="magma", vmin=0, vmax=limit)
        if size.any():
            board.bar(0, 1, -0.17, shown, "|fused - query|", extend="max", ticklocation="left", ticks=MaxNLocator(4))
    if maps.cell is not None:
        cell = _cell_box(maps, maps.cell)
        _outline(picture, cell)
        if maps.samples is not None and maps.weights is not None:
            window = _window(cell, maps.samples, maps.weights)
            _outline(picture, window, (0, (3, 2)))
            _sample_panels(board, maps, cell, window, maps.samples, maps.weights)
    return board.figure


def _frame(axes: Any, maps: FeatureMaps, title: str, area: Optional[Edges] = None) -> None:
    """Let axes show an area, or the whole picture."""
    area = (0, 0, *maps.picture.size) if area is None else area
    axes.set(xlim=(area[0], area[2]), ylim=(area[3], area[1]), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9, pad=3)


def _show_picture(axes: Any, maps: FeatureMaps, **settings: Any) -> Any:
    picture = maps.picture.copy()
    picture.thumbnail((1000, 1000))  # a panel has fewer pixels
    picture = picture.convert("L") if "cmap" in settings else picture
    return axes.imshow(picture, extent=(0, maps.picture.width, maps.picture.height, 0), **settings)


def _outline(axes: Any, box: Edges, style: Any = "-") -> None:
    """A white rectangle, edged in black."""
    for colour, thickness in (("black", 2.4), ("white", 1.2)):
        axes.add_patch(_rectangle(box, fill=False, edgecolor=colour, linewidth=thickness, linestyle=style))


def _rectangle(box: Edges, **settings: Any) -> Any:
    return Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], **settings)


def _cell_box(maps: FeatureMaps, cell: Tuple[int, int]) -> np.ndarray:
    """Edges of a cell (row, column), in pixels of the picture."""
    step = (np.array(maps.box[2:]) - maps.box[:2]) / maps.layers.shape[2:0:-1]
    corner = maps.box[:2] + np.array(cell[::-1]) * step
    return np.concatenate([corner, corner + step])


def _window(cell: np.ndarray, samples: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Edges of the square around a cell that holds `SHOWN` of the weights, with a margin of one cell."""
    centre = (cell[:2] + cell[2:]) / 2
    distance = np.abs(samples - centre).max(-1).ravel()
    order = distance.argsort()
    held = weights.ravel()[order].cumsum()
    half = distance[order][np.searchsorted(held, SHOWN * held[-1])] + (cell[2:] - cell[:2]).max()
    return np.concatenate([centre - half, centre + half])


def _map_panel(axes: Any, maps: FeatureMaps, title: str, field: Any, **settings: Any) -> Any:
    _show_picture(axes, maps, alpha=0.3)
    left, top, right, bottom = maps.box
    shown = axes.imshow(field, extent=(left, right, bottom, top), interpolation="bilinear", **settings)
    _frame(axes, maps, title)
    return shown


def _sample_panels(
    board: _Board, maps: FeatureMaps, cell: Edges, window: Edges, samples: np.ndarray, of_all: np.ndarray
) -> None:
    heads, levels, points = of_all.shape
    palette = ListedColormap(colormaps["hsv"](np.arange(heads) / heads))
    colouring = ScalarMappable(Normalize(-0.5, heads - 0.5), palette)
    for level in range(levels):
        axes = board.axes(1 + level, 2)
        weights = of_all[:, level].reshape(-1)
        axes.add_patch(_rectangle(maps.box, color="0.75", zorder=-1))
        _show_picture(axes, maps, cmap="gray", vmin=-200, vmax=255)
        size = 18 * weights * levels * points  # 18 square points where all weights are equal
        colour = colouring.to_rgba(np.repeat(np.arange(heads), points))
        x, y = samples[:, level].reshape(-1, 2).T
        axes.scatter(x, y, s=size, color=colour, edgecolors="black", linewidths=0.4, alpha=0.85)
        _outline(axes, cell)
        _frame(axes, maps, f"samples, weight {weights.sum() / heads:.0%}", window)
    board.bar(levels, 2, board.width + 0.08, colouring, "head", ticks=range(0, heads, max(1, heads // 8)))
