"""What transformers' own LLaVA can say: a projector whose first layer reads a list of layers side by side."""

from typing import Dict, Optional, Sequence

import torch
import torch.nn.functional as F

from ..block.fusion import Fusion

LINEAR = ("mean", "sum", "weighted_sum", "channel_concat", "dense_channel")  # fusions that are one matrix


@torch.no_grad()
def first_layer(
    fusion: str, fuser: Fusion, layers: Sequence[int], weight: torch.Tensor
) -> Optional[Dict[int, torch.Tensor]]:
    """The part of a stock projector's first weight [D, C] for each layer, so that it does what fusion and weight do.

    `layers` are hidden_states indices, in the fuser's order. Returns layer to [D, C] in float64, in that order, without
    those that have no part in the result; None for a fusion that is neither linear nor an identity.
    """
    weight = weight.double()
    if fusion not in LINEAR:
        return {layers[-1]: weight} if fuser.is_identity() else None
    fuser = fuser.double()
    width = fuser.hidden_size
    blocks = {}
    for index, layer in enumerate(layers):  # the answer of a linear map to the unit vectors is its matrix
        maps = [torch.eye(width, dtype=torch.float64) * (other == index) for other in range(len(layers))]
        maps = [features.unsqueeze(0) for features in maps]  # [1, C, C]: one token for each channel
        answer = F.linear(fuser(maps), weight)
        if fuser.acts_in_first_layer:
            answer = answer + fuser.to_first_layer(maps)
        if answer.any():
            blocks[layer] = answer[0].T.contiguous()
    return blocks
