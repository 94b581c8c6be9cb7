"""Random blocks and feature maps, projectors with a fuser, and how far half types may be off."""

import torch

from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.config import MMFuserConfig
from llava_mmfuser.projector import MMFuserProjector

# bf16 and fp16 against float64 on the same rounded inputs and weights: largest deviation relative to the largest value.
HALF_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def awake(fuser, spread=2.0, scale=0.3):
    """Random values everywhere, so that gates, offsets and attention weights all matter."""
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (spread if name.endswith("sampling_offsets.bias") else scale))
    return fuser


def maps(num_layers, batch=2, side=4, width=16, dtype=torch.float64):
    return [torch.randn(batch, side * side, width, dtype=dtype, requires_grad=True) for _ in range(num_layers)]


def close(found, expected, limit):
    return (found - expected).abs().max() <= limit * expected.abs().max()


SIMPLE = [name for name in FUSIONS if name != "mmfuser"]


def projector(kind="mlp2x_gelu", width=8, out=12):
    if kind == "linear":
        return torch.nn.Linear(width, out)
    return torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.GELU(), torch.nn.Linear(out, out))


def fused_projector(fusion, num_layers=5, kind="mlp2x_gelu", inner=None):
    settings = MMFuserConfig(layers=tuple(range(num_layers)), fusion=fusion, projector=kind)
    return MMFuserProjector.build(settings, 8, inner or projector(kind))
