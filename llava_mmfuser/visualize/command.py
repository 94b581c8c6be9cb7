"""`visualize`: draws the feature maps of pictures, one PNG each."""

import contextlib
import os
import re
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .drawing import draw
from .maps import feature_maps
from .pictures import MARK, expand, output_names, read_picture
from .reading import Model, read_model


class Outcome(NamedTuple):
    """One line for the user."""

    text: str
    failed: bool = False


def visualize(
    images: Sequence[str], output: str, at: Optional[str] = None, npz: bool = False, **model: Any
) -> Iterator[Outcome]:
    """Write one PNG for each picture into the folder `output`.

    Args:
        images: files, folders or URLs, see `expand` and `read_picture`.
        output: made if it is absent. Maps of NAME.jpg are NAME.maps.png, with -2, -3, … where several are called alike.
        at: ``x,y``, a point in pixels of every picture; shows where the query there samples.
        npz: write the arrays of `FeatureMaps.arrays` beside each PNG.
        model: arguments of `read_model`.

    Yields:
        An `Outcome` for each note, each picture that was written and each that could not be.

    Raises:
        ValueError: before any picture is done: no matplotlib, `at` is no point, or a model that cannot be read.
        OSError: `output` cannot be made.
    """
    point = None if at is None else _parse_point(at)
    _check_matplotlib()
    sources: List[str] = []
    for image in images:
        try:
            sources += expand(image)
        except (OSError, ValueError) as error:
            yield Outcome(str(error), failed=True)
    if not sources:
        return
    os.makedirs(output, exist_ok=True)
    loaded = read_model(**model)
    yield from map(Outcome, loaded.notes)
    inputs = set(map(os.path.realpath, sources))
    for source, name in zip(sources, output_names(sources)):
        path = os.path.join(output, name + MARK)
        try:
            if os.path.realpath(path + ".png") in inputs:
                raise ValueError(f"its feature maps would overwrite {path}.png; choose another --output")
            yield Outcome(_one(loaded, source, path, point, npz))
        except (OSError, ValueError) as error:
            yield Outcome(f"{source}: {error}", failed=True)


def _one(model: Model, source: str, path: str, at: Optional[Tuple[float, float]], npz: bool) -> str:
    """Do one picture; `path` is that of the results, without their endings. Returns a line for the user."""
    file = path + ".png"
    maps = feature_maps(model, read_picture(source), at)
    figure = draw(maps, os.path.basename(source))
    with _beside(file) as stream:
        figure.savefig(stream, format="png")
    if npz:
        with _beside(path + ".npz") as stream:
            np.savez(stream, **maps.arrays())
    if maps.fused is None:
        file += "; without the fused map, because the fuser returns none like the query's"
    if at is not None and maps.samples is None:
        file += "; without samples, because the fuser's attention has none"
    return file


@contextlib.contextmanager
def _beside(path: str) -> Iterator[Any]:
    """A stream to a file beside `path` that becomes `path` at the end, so that this is never half-written."""
    partial = path + ".partial"
    try:
        with open(partial, "wb") as stream:
            yield stream
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def _parse_point(text: str) -> Tuple[float, float]:
    number = r"\s*([+-]?\d+(?:\.\d*)?)\s*"
    match = re.fullmatch(number + "," + number, text)
    if not match:
        raise ValueError(f"--at {text} is not allowed; use x,y in pixels of the picture, such as 120,80")
    return float(match[1]), float(match[2])


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); install it: pip install matplotlib") from error
