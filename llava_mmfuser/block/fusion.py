"""What every fusion answers about itself to those who load, train, project and draw it."""

from typing import Optional, Sequence, Tuple

import torch
from torch import nn

Maps = Sequence[torch.Tensor]


class Fusion(nn.Module):
    """Makes of num_layers maps [B, N, C], shallow first, the query last, what LLaVA's projector reads: [B, N, C].

    Args:
        hidden_size: width C of every feature map.
        num_layers: number of feature maps L, at least 2.
    """

    acts_in_first_layer = False  # whether `to_first_layer` adds to the output of the projector's first layer

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers

    def num_tokens(self, tokens: int) -> int:
        """How many tokens it makes of maps of this many."""
        return tokens

    def gate(self) -> Optional[nn.Parameter]:
        """The parameter that every change of the query passes through; None of a fusion that never is an identity."""
        return None

    def is_identity(self) -> bool:
        """Whether it returns the query whatever the maps are, going by `gate`."""
        gate = self.gate()
        return gate is not None and not gate.detach().any()

    def to_first_layer(self, layers: Maps) -> torch.Tensor:
        """What it adds to the output of the projector's first layer: [B, N, out_features]."""
        raise NotImplementedError

    def samples(self, layers: Maps) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        """Where each query looks in the shallow maps; None of a fusion that looks everywhere or nowhere.

        Returns:
            Places [B, N, heads, L-1, P, 2] (x, y last) in cells, the centre of the first cell at 0, and their weights
            [B, N, heads, L-1, P], which sum to 1 for every head.
        """
        return None
