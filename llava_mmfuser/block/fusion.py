"""What every fusion answers about itself to those who load, train, project and draw it."""

import math
from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
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

    def project(self, features: torch.Tensor, first_layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Fuse what a tower returns, and run the projector's first layer on it.

        Args:
            features: [B, N, L*C], or [B, 1+N, L*C] with CLS first; N a square. The query's CLS passes unfused.
            first_layer: maps [..., C] to [..., D].

        Returns:
            [B, N, D] or [B, 1+N, D], N as `num_tokens` says.

        Raises:
            ValueError: a channel count that is not L*C, or a token count that is neither a square nor one more.
        """
        if features.dim() != 3 or features.shape[-1] != self.num_layers * self.hidden_size:
            raise ValueError(
                f"features {tuple(features.shape)} must be [B, N, {self.num_layers} * {self.hidden_size}]: "
                f"this projector fuses {self.num_layers} layers; is the vision tower's select_layer the same?"
            )
        layers = features.unflatten(-1, (self.num_layers, self.hidden_size)).unbind(-2)
        tokens = features.shape[1]
        has_cls = math.isqrt(tokens) ** 2 != tokens
        if has_cls and math.isqrt(tokens - 1) ** 2 != tokens - 1:
            raise ValueError(f"{tokens} tokens are neither a square map nor one with CLS in front")
        patches = [layer[:, 1:] for layer in layers] if has_cls else layers
        fused = self(patches)
        # In memory as LLaVA's own map, of which PyTorch makes other products in the last bits than of a copy.
        if features.stride(1) < features.stride(2):  # channels before tokens
            fused = fused.transpose(1, 2).contiguous().transpose(1, 2)
        elif features.stride(0) != tokens * features.stride(1):  # a view behind CLS
            fused = F.pad(fused, (0, 0, 1, 0))[:, 1:]
        if has_cls:
            fused = torch.cat([layers[-1][:, :1], fused], dim=1)
        out = first_layer(fused)
        if self.acts_in_first_layer:
            extra = self.to_first_layer(patches).to(out.dtype)
            out = out + F.pad(extra, (0, 0, int(has_cls), 0))
        return out

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
