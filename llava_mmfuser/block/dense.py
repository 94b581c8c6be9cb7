"""Global attention: every query looks at every token of every level. Cost grows with the square of the tokens."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .leaves import LayerNorm, Linear, normed_linears


class DenseAttention(nn.Module):
    """Multi-head scaled dot-product attention (arXiv 1706.03762) over all levels at once, without positions.

    Args:
        hidden_size: feature width C.
        num_levels: number of value maps L; any number runs through the same weights.
        num_heads: heads; must divide hidden_size.
    """

    def __init__(self, hidden_size: int, num_levels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_proj = Linear(hidden_size, hidden_size)
        self.key_proj = Linear(hidden_size, hidden_size)
        self.value_proj = Linear(hidden_size, hidden_size)
        self.output_proj = Linear(hidden_size, hidden_size)

    def forward(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        grid: Tuple[int, int],
        query_norm: Optional[LayerNorm] = None,
        value_norm: Optional[LayerNorm] = None,
    ) -> torch.Tensor:
        """Attend from query [B, H*W, C] to value [B, L*H*W, C] on a grid (H, W), which does not matter: [B, H*W, C]."""
        projected = normed_linears(query, query_norm, self.query_proj)
        projected += normed_linears(value, value_norm, self.key_proj, self.value_proj)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]  # [B, heads, tokens, D]
        return self.output_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
