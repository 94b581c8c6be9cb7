"""Feature maps as a figure."""

import textwrap
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import numpy as np

from .maps import FeatureMaps

DEVIATIONS = 2  # standard deviations of a principal component between the middle and the end of its colour
PERCENTILES = (2, 98)  # of the norms, at the ends of their scale: CLIP's deep layers have a few very long patches
SHOWN = 0.95  # of the weights of samples lie in the window that is drawn
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
WIDTH, HEIGHT, FLAT, NARROW = 1.6, 2.4, 0.3, 1.35  # inches: of a panel at most, its height and a column at least
LEFT, RIGHT, TOP, TITLE, GAP = 0.75, 0.7, 0.4, 0.25, 0.12  # inches around panels
DPI = 160

Edges = Union[Sequence[float], np.ndarray]  # left, top, right, bottom


def colours(maps: FeatureMaps) -> List[np.ndarray]:
    """The layers and, if there is one, the fused map as RGB in 0 … 1, [H, W, 3] each; see `CAPTION`."""
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
    """Scores [H, W, 3] of a map in the main components of its real patches, in standard deviations of these; and the
    function that gives the scores of another map in the same components."""

    def normed(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    patches = normed(layer)[real]  # [n, C]
    mean = patches.mean(0)
    patches = patches - mean
    values, vectors = np.linalg.eigh(patches @ patches.T)  # cheaper than a decomposition of [n, C]
    values, vectors = values[:-4:-1], vectors[:, :-4:-1]
    kept = values > 1e-9 * max(values[0], 1e-9)  # a map without contrast has fewer than three
    basis = np.zeros((layer.shape[-1], 3))
    basis[:, : len(kept)] = patches.T @ vectors * np.where(kept, np.sqrt(len(patches)) / np.where(kept, values, 1), 0)
    basis *= np.where(basis[np.abs(basis).argmax(0), range(3)] < 0, -1, 1)  # the sign is arbitrary; make it repeatable

    def project(x: np.ndarray) -> np.ndarray:
        return (normed(x) - mean) @ basis

    return project(layer), project


class _Board:
    """A figure on which panels are placed by column and row, in inches."""

    def __init__(self, columns: int, rows: Sequence[float], width: float, caption: Sequence[str]):
        from matplotlib.figure import Figure

        self.width, self.rows = width, rows
        total = LEFT + columns * (width + GAP) + 2 * GAP + RIGHT
        lines = [line for text in caption for line in textwrap.wrap(text, int(total * 16))]
        self.height = TOP + sum(rows) + len(rows) * (TITLE + GAP) + 0.14 * len(lines) + 0.1
        self.figure = Figure(figsize=(total, self.height), dpi=DPI)
        self.figure.text(LEFT / total, 0.08 / self.height, "\n".join(lines), fontsize=7.5, color="0.3", va="bottom")

    def axes(self, column: int, row: int, left: float = 0.0, width: Optional[float] = None) -> Any:
        """Axes over a place of the grid, or from `left` of that on, `width` wide; a gap follows the first column."""
        total = self.figure.get_size_inches()[0]
        x = LEFT + column * (self.width + GAP) + (2 * GAP if column else 0) + left
        y = TOP + sum(self.rows[: row + 1]) + (row + 1) * TITLE + row * GAP
        box = x / total, 1 - y / self.height, (width or self.width) / total, self.rows[row] / self.height
        return self.figure.add_axes(box)

    def bar(self, column: int, row: int, left: float, colouring: Any, label: str, **settings: Any) -> None:
        """A colour bar beside a panel."""
        bar = self.figure.colorbar(colouring, cax=self.axes(column, row, left, 0.09), **settings)
        bar.set_label(label, fontsize=8, labelpad=2)
        bar.ax.tick_params(labelsize=7, length=2, pad=1)


def draw(maps: FeatureMaps, title: str) -> Any:
    """The matplotlib `Figure` of one picture's maps.

    Rows: the picture and the maps in colours; the difference that the fuser makes and the norms; with a chosen point,
    its samples in each shallow layer. Panels of maps show the picture's area; what the tower does not see is pale.
    """
    names = [f"layer {index}" for index in maps.indices]
    names[-1] += " = query"
    fields = list(maps.layers)
    if maps.fused is not None:
        names.append("fused")
        fields.append(maps.fused)
    area = (0.0, 0.0, *map(float, maps.picture.size))
    scale = min(WIDTH / area[2], HEIGHT / area[3])
    height = max(area[3] * scale, FLAT)
    rows = [height, height] + ([] if maps.samples is None else [WIDTH])
    width = WIDTH if maps.samples is not None else max(NARROW, area[2] * scale)
    board = _Board(1 + len(fields), rows, width, CAPTION + (() if maps.samples is None else SAMPLES_CAPTION))
    text = f"{title}, {maps.picture.width} x {maps.picture.height}   |   {maps.label}"
    board.figure.text(
        LEFT / board.figure.get_size_inches()[0],
        1 - 0.12 / board.height,
        (text if text.isprintable() else ascii(text)[1:-1]).replace("$", r"\$"),  # bytes that are no text: no glyphs
        fontsize=11,
        va="top",
    )
    _picture_panel(board.axes(0, 0), maps, area)
    for column, (name, rgb) in enumerate(zip(names, colours(maps)), 1):
        _map_panel(board.axes(column, 0), maps, area, name, rgb)
    if maps.difference is not None:
        _difference_panel(board, maps, area, maps.difference)
    _norm_panels(board, maps, area, fields)
    _sample_panels(board, maps)
    return board.figure


def _frame(axes: Any, area: Edges, title: str) -> None:
    axes.set(xlim=(area[0], area[2]), ylim=(area[3], area[1]), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9, pad=3)


def _edges(box: Sequence[float]) -> Tuple[float, ...]:
    """matplotlib's extent of a box."""
    return box[0], box[2], box[3], box[1]


def _show_picture(axes: Any, maps: FeatureMaps, **settings: Any) -> Any:
    picture = maps.picture.copy()
    picture.thumbnail((1000, 1000))  # a panel has fewer pixels
    if "cmap" in settings:
        picture = picture.convert("L")
    return axes.imshow(picture, extent=(0, maps.picture.width, maps.picture.height, 0), **settings)


def _outline(axes: Any, box: Edges, style: Any = "-") -> None:
    """A white rectangle, edged in black."""
    for colour, thickness in (("black", 2.4), ("white", 1.2)):
        axes.add_patch(_rectangle(box, fill=False, edgecolor=colour, linewidth=thickness, linestyle=style))


def _rectangle(box: Edges, **settings: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], **settings)


def _cell_box(maps: FeatureMaps, cell: Tuple[int, int]) -> np.ndarray:
    """Edges of a cell (row, column), in pixels of the picture."""
    step = (np.array(maps.box[2:]) - maps.box[:2]) / maps.layers.shape[2:0:-1]
    corner = maps.box[:2] + np.array(cell[::-1]) * step
    return np.concatenate([corner, corner + step])


def _window(cell: np.ndarray, samples: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Edges of a square around those of a cell, with `SHOWN` of the weights in it and a margin of a cell."""
    centre = (cell[:2] + cell[2:]) / 2
    distance = np.abs(samples - centre).max(-1).ravel()
    order = distance.argsort()
    held = weights.ravel()[order].cumsum()
    half = distance[order][np.searchsorted(held, SHOWN * held[-1])] + (cell[2:] - cell[:2]).max()
    return np.concatenate([centre - half, centre + half])


def _picture_panel(axes: Any, maps: FeatureMaps, area: Tuple[float, ...]) -> None:
    _show_picture(axes, maps, alpha=0.3)
    _show_picture(axes, maps).set_clip_path(_rectangle(maps.box, transform=axes.transData))
    _frame(axes, area, "picture" if maps.at is None else "picture, point {:g},{:g}".format(*maps.at))
    if maps.cell is not None:
        cell = _cell_box(maps, maps.cell)
        _outline(axes, cell)
        if maps.samples is not None and maps.weights is not None:
            _outline(axes, _window(cell, maps.samples, maps.weights), (0, (3, 2)))


def _map_panel(axes: Any, maps: FeatureMaps, area: Tuple[float, ...], title: str, field: Any, **settings: Any) -> Any:
    _show_picture(axes, maps, alpha=0.3)
    shown = axes.imshow(field, extent=_edges(maps.box), interpolation="bilinear", **settings)
    _frame(axes, area, title)
    return shown


def _difference_panel(board: _Board, maps: FeatureMaps, area: Tuple[float, ...], difference: np.ndarray) -> None:
    size = np.linalg.norm(difference, axis=-1)
    relative = (size / np.linalg.norm(maps.layers[-1], axis=-1).clip(1e-12))[maps.real].mean()
    title = f"difference, {relative:.1%}" if size.any() else "difference, exactly 0"
    limit = np.percentile(size[maps.real], PERCENTILES[1]) or 1.0
    shown = _map_panel(board.axes(0, 1), maps, area, title, size, cmap="magma", vmin=0, vmax=limit)
    if size.any():
        board.bar(0, 1, -0.17, shown, "|fused - query|", extend="max", ticklocation="left", ticks=_few_ticks())


def _norm_panels(board: _Board, maps: FeatureMaps, area: Tuple[float, ...], fields: List[np.ndarray]) -> None:
    norms = [np.linalg.norm(field, axis=-1) for field in fields]
    low, high = np.percentile(np.stack([norm[maps.real] for norm in norms]), PERCENTILES)
    for column, norm in enumerate(norms, 1):
        title = f"norm, median {np.median(norm[maps.real]):.3g}"
        shown = _map_panel(board.axes(column, 1), maps, area, title, norm, cmap="viridis", vmin=low, vmax=high)
    board.bar(len(norms), 1, board.width + 0.08, shown, "norm", extend="both", ticks=_few_ticks())


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _sample_panels(board: _Board, maps: FeatureMaps) -> None:
    if maps.cell is None or maps.samples is None or maps.weights is None:
        return
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    cell = _cell_box(maps, maps.cell)
    window = _window(cell, maps.samples, maps.weights)
    heads, levels, points = maps.weights.shape
    palette = ListedColormap(colormaps["hsv"](np.arange(heads) / heads))
    colouring = ScalarMappable(Normalize(-0.5, heads - 0.5), palette)
    for level in range(levels):
        axes = board.axes(1 + level, 2)
        places, weights = maps.samples[:, level].reshape(-1, 2), maps.weights[:, level].reshape(-1)
        title = f"samples, weight {weights.sum() / heads:.0%}"
        axes.add_patch(_rectangle(maps.box, color="0.75", zorder=-1))
        _show_picture(axes, maps, cmap="gray", vmin=-200, vmax=255)
        axes.scatter(
            *places.T,
            s=18 * weights * levels * points,  # 18 square points where all weights are equal
            color=colouring.to_rgba(np.repeat(np.arange(heads), points)),
            edgecolors="black",
            linewidths=0.4,
            alpha=0.85,
        )
        _outline(axes, cell)
        _frame(axes, window, title)
    board.bar(levels, 2, board.width + 0.08, colouring, "head", ticks=range(0, heads, max(1, heads // 8)))
