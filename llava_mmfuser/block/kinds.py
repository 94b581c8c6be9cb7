"""Which fusions and kinds of attention there are, and which settings are allowed. Imports nothing heavy."""

from typing import Any, Dict, Iterable, Mapping, NamedTuple, Tuple


class FusionKind(NamedTuple):
    """A row of `FUSIONS`."""

    starts_as_identity: bool  # so that a released LLaVA answers as before
    has_weights: bool


FUSIONS = {  # the classes are in mmfuser.py and rivals.py
    "mmfuser": FusionKind(starts_as_identity=True, has_weights=True),
    "mean": FusionKind(starts_as_identity=False, has_weights=False),
    "sum": FusionKind(starts_as_identity=False, has_weights=False),
    "weighted_sum": FusionKind(starts_as_identity=True, has_weights=True),
    "channel_concat": FusionKind(starts_as_identity=True, has_weights=True),
    "dense_channel": FusionKind(starts_as_identity=True, has_weights=True),
    "token_concat": FusionKind(starts_as_identity=False, has_weights=False),
}
# attention kind -> the settings that concern only it; the classes are in attention.py
ATTENTION_KINDS: Dict[str, Tuple[str, ...]] = {"deformable": ("num_points",), "dense": (), "window": ("window_size",)}
OUTPUTS = ("add", "columns")  # how mmfuser's detail enters; see mmfuser.py
STARTS = ("identity", "open")  # how a fresh mmfuser starts

MAX_WIDTH = 1 << 17  # the widest language models have an eighth of this
MAX_LAYERS = 1000  # the deepest ViTs have a few hundred blocks
# setting -> its largest value: more points than a map has cells, a window beyond the map and a deeper projector would
# only take memory. num_heads divides the width, too.
LARGEST = {"num_heads": 1024, "num_points": 256, "window_size": 63}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a fusion that are not allowed, whichever of them are there.

    Args:
        settings: ``fusion``, ``attention``, ``self_attention``, ``num_heads``, ``num_points``, ``window_size``,
            ``output``, ``start``.

    Raises:
        ValueError: the setting, its value and what is allowed.
    """
    named: Dict[str, Iterable[str]] = {
        "fusion": FUSIONS,
        "attention": ATTENTION_KINDS,
        "output": OUTPUTS,
        "start": STARTS,
    }
    for name, allowed in named.items():
        if settings.get(name, next(iter(allowed))) not in tuple(allowed):
            raise ValueError(f"mm_fuser_{name}={settings[name]!r} is not allowed; use {' or '.join(allowed)}")
    if not isinstance(settings.get("self_attention", True), bool):
        raise ValueError(f"mm_fuser_self_attention={settings['self_attention']!r} is not allowed; use True or False")
    for name, largest in LARGEST.items():
        check_count(settings.get(name, 1), largest, f"mm_fuser_{name}")
    window_size = settings.get("window_size", 1)
    if window_size % 2 == 0:
        raise ValueError(
            f"mm_fuser_window_size={window_size} is not allowed; a neighbourhood has a centre, so use an odd "
            f"number such as {window_size + 1}"
        )


def refuse_open(start: str, projector: str) -> None:
    """Refuse a fresh fuser that does not start as an identity in front of a projector that was trained without it.

    Args:
        start: one of `STARTS`.
        projector: where that projector comes from.

    Raises:
        ValueError: `start` is ``open``.
    """
    if start == "open":
        raise ValueError(
            f"mm_fuser_start=open is not allowed in front of a trained projector ({projector}), which would read other "
            f"features at once; drop the flag, or train a fresh projector"
        )


def check_count(value: Any, largest: int, setting: str, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number in these bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
        shown = str(value) if isinstance(value, int) and abs(value) < 1 << 64 else repr(value)[:40]
        raise ValueError(f"{setting}={shown} is not allowed; use a whole number from {least} to {largest}")


def check_num_heads(hidden_size: int, num_heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    check_count(hidden_size, MAX_WIDTH, "hidden_size")
    if hidden_size % num_heads:
        allowed = [n for n in range(1, min(hidden_size, 64) + 1) if hidden_size % n == 0]
        raise ValueError(
            f"mm_fuser_num_heads={num_heads} does not divide the feature width {hidden_size}; "
            f"use one of {', '.join(map(str, allowed))}"
        )
