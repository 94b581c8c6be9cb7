"""Pictures that are given as files, folders or URLs, read as LLaVA reads them."""

import io
import os
import re
from typing import Dict, List, Sequence
from urllib.parse import unquote, urlsplit

from PIL import Image

TIMEOUT = 30  # seconds that a server may stay silent
MARK = ".maps"  # before the ending of every file that is written, so that no picture is overwritten
_URL = re.compile(r"https?://", re.IGNORECASE)


def expand(source: str) -> List[str]:
    """The pictures of a folder, sorted by name, without subfolders and hidden files; or the file or URL itself."""
    if _URL.match(source) or not os.path.isdir(source):
        return [source]
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = [name for name in sorted(os.listdir(source)) if os.path.splitext(name)[1].lower() in endings]
    names = [name for name in names if not name.startswith(".") and not name.endswith(MARK + ".png")]
    if not names:
        raise ValueError(f"the folder {source} has no pictures (.png, .jpg or another ending that Pillow reads)")
    return [os.path.join(source, name) for name in names]


def read_picture(source: str) -> Image.Image:
    """A file or URL in RGB. As in LLaVA, EXIF orientation is ignored and an animation gives its first frame."""
    if _URL.match(source):
        import requests

        try:
            response = requests.get(source, timeout=TIMEOUT)
            response.raise_for_status()
        except requests.RequestException as error:
            raise ValueError(f"it cannot be fetched: {error}") from error
    elif not os.path.isfile(source):
        raise ValueError("no such file")
    try:
        with Image.open(io.BytesIO(response.content) if _URL.match(source) else source) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        reason = "no format that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
        raise ValueError(f"it cannot be read as a picture: {reason}") from error


def output_names(sources: Sequence[str]) -> List[str]:
    """A file name for each source, without ending. No two differ in case alone."""
    names: Dict[str, str] = {}
    for source in sources:
        path = unquote(urlsplit(source).path) if _URL.match(source) else source
        name = stem = re.sub(r"[^\w.-]+", "_", os.path.splitext(os.path.basename(path))[0]) or "picture"
        number = 1
        while name.lower() in names:
            number += 1
            name = f"{stem}-{number}"
        names[name.lower()] = name
    return list(names.values())
