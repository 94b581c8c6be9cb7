"""The simple fusions that MMFuser is compared with, and `build_fusion`, which builds any.

`kinds.FUSIONS` says which of them start as an identity.
"""

from functools import reduce
from typing import Any, Dict, Type

import torch
from torch import nn

from .fusion import Fusion, Maps
from .leaves import Resettable, ZeroLinear
from .mmfuser import MMFuser


class SimpleFusion(Fusion):
    """Fusions that need to know no more than the shape of the maps.

    Args:
        hidden_size: width C of every feature map.
        num_layers: number of feature maps L, at least 2.
        out_features: width of the first layer of the projector behind the fusion.
    """

    def __init__(self, hidden_size: int, num_layers: int, out_features: int):
        super().__init__(hidden_size, num_layers)


class Mean(SimpleFusion):
    """The element-wise mean of all maps."""

    def forward(self, layers: Maps) -> torch.Tensor:
        return reduce(torch.add, layers) / len(layers)


class Sum(SimpleFusion):
    """The element-wise sum of all maps."""

    def forward(self, layers: Maps) -> torch.Tensor:
        return reduce(torch.add, layers)


class WeightedSum(Resettable, SimpleFusion):
    """A sum with one learned weight per map, at first 1 for the query and 0 for the others: an identity."""

    decays = False

    def __init__(self, hidden_size: int, num_layers: int, out_features: int):
        super().__init__(hidden_size, num_layers, out_features)
        self.scale = nn.Parameter(torch.empty(num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.zero_()
        self.scale[-1] = 1

    def gate(self) -> nn.Parameter:
        return self.scale

    def is_identity(self) -> bool:
        return not self.scale.detach()[:-1].any()

    def forward(self, layers: Maps) -> torch.Tensor:
        weights = self.scale.to(layers[-1].dtype).unbind()
        return reduce(torch.add, (layer * weight for layer, weight in zip(layers, weights)))


class TokenConcat(SimpleFusion):
    """All maps as tokens of their own, shallow first: L times as many for the language model."""

    def forward(self, layers: Maps) -> torch.Tensor:
        return torch.cat(list(layers), dim=1)  # [B, L*N, C]

    def num_tokens(self, tokens: int) -> int:
        return self.num_layers * tokens


class ChannelConcat(SimpleFusion):
    """All maps side by side on the channel axis, for a projector whose first layer reads L*C channels.

    That layer is stored in two parts: the query's columns are LLaVA's own first layer, under its own name and shape,
    and those of the other maps are `extra`, zero at first. So a released projector fits, and nothing changes at first.
    """

    acts_in_first_layer = True

    def __init__(self, hidden_size: int, num_layers: int, out_features: int):
        super().__init__(hidden_size, num_layers, out_features)
        self.extra = ZeroLinear(self.extra_width(), out_features, bias=False)

    def extra_width(self) -> int:
        """Channels beside the query's."""
        return (self.num_layers - 1) * self.hidden_size

    def extra_channels(self, layers: Maps) -> torch.Tensor:
        """The maps below the query, side by side: [B, N, extra_width]."""
        return torch.cat(list(layers[:-1]), dim=-1)

    def forward(self, layers: Maps) -> torch.Tensor:
        return layers[-1].contiguous()  # as without a fusion: a matrix product's rounding depends on the strides

    def to_first_layer(self, layers: Maps) -> torch.Tensor:
        return self.extra(self.extra_channels(layers))

    def gate(self) -> nn.Parameter:
        return self.extra.weight


class DenseChannel(ChannelConcat):
    """Dense Connector's channel integration (arXiv 2405.13800): the query beside the means of both halves of the maps.

    With the layers ``all`` of ViT-L below hidden_states[23] the halves are 0 … 11 and 12 … 23, as published. An odd map
    in the middle goes to the deep half.
    """

    def extra_width(self) -> int:
        return 2 * self.hidden_size

    def extra_channels(self, layers: Maps) -> torch.Tensor:
        half = len(layers) // 2
        return torch.cat([reduce(torch.add, part) / len(part) for part in (layers[:half], layers[half:])], dim=-1)


_SIMPLE: Dict[str, Type[SimpleFusion]] = {
    "mean": Mean,
    "sum": Sum,
    "weighted_sum": WeightedSum,
    "channel_concat": ChannelConcat,
    "dense_channel": DenseChannel,
    "token_concat": TokenConcat,
}


def build_fusion(fusion: str, hidden_size: int, num_layers: int, out_features: int, **of_mmfuser: Any) -> Fusion:
    """A fresh fusion.

    Args:
        fusion: a key of `kinds.FUSIONS`.
        hidden_size: width of the feature maps.
        num_layers: their number.
        out_features: width of the first layer of the projector behind it.
        of_mmfuser: the other arguments of `MMFuser`, of which the simple fusions read none.

    Raises:
        ValueError: heads that do not divide the width.
    """
    if fusion == "mmfuser":
        return MMFuser(hidden_size, num_layers, out_features=out_features, **of_mmfuser)
    return _SIMPLE[fusion](hidden_size, num_layers, out_features)
