"""Interchangeable attention kinds: (query [B, N, C], value [B, L*N, C], grid (H, W)) -> [B, N, C].

A kind is a row of `kinds.ATTENTION_KINDS` and a class here, built from ``(hidden_size, num_levels, num_heads)`` and the
settings that its row names. Its forward takes the norms of query and value, too, or None where they are normalised
already; `leaves.normed_linears` applies them.
"""

from typing import Any, Dict, Type

from torch import nn

from .deformable import DeformableAttention
from .dense import DenseAttention
from .kinds import ATTENTION_KINDS
from .window import WindowAttention

_CLASSES: Dict[str, Type[nn.Module]] = {
    "deformable": DeformableAttention,
    "dense": DenseAttention,
    "window": WindowAttention,
}


def build_attention(
    kind: str, hidden_size: int, num_levels: int, num_heads: int, near: bool = False, **settings: Any
) -> nn.Module:
    """A fresh attention of one kind.

    Args:
        kind: a key of `kinds.ATTENTION_KINDS`.
        hidden_size: feature width C.
        num_levels: number of value maps L.
        num_heads: heads; must divide hidden_size.
        near: whether deformable attention starts at the query's own cell; the other kinds see it anyway.
        settings: of all kinds; those of other kinds are left out.
    """
    own = {name: settings[name] for name in ATTENTION_KINDS[kind]}
    if kind == "deformable":
        own["near"] = near
    return _CLASSES[kind](hidden_size, num_levels, num_heads, **own)
