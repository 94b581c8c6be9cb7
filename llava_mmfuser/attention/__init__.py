"""Interchangeable attention kinds: (query [B, N, C], value [B, L*N, C], grid (H, W)) -> [B, N, C].

A kind is a row of `config.ATTENTION_KINDS` and a file of its name with a class such as `DenseAttention`, built from
``(hidden_size, num_levels, num_heads)`` and the settings that its row names. Query and value may be `Normalized`.
"""

import importlib
from typing import Any

from torch import nn

from ..config import ATTENTION_KINDS


def build_attention(kind: str, hidden_size: int, num_levels: int, num_heads: int, **settings: Any) -> nn.Module:
    """A fresh attention of one kind.

    Args:
        kind: a key of `config.ATTENTION_KINDS`.
        hidden_size: feature width C.
        num_levels: number of value maps L.
        num_heads: heads; must divide hidden_size.
        settings: of all kinds; those of other kinds are left out.
    """
    module = importlib.import_module(f"{__name__}.{kind}")
    own = {name: settings[name] for name in ATTENTION_KINDS[kind]}
    return getattr(module, f"{kind.capitalize()}Attention")(hidden_size, num_levels, num_heads, **own)
