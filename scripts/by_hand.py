"""The whole idea in one file: what LLaVA computes under `--mm_projector_type mmfuser`, written by hand.

    python scripts/by_hand.py

It runs a tiny random tower in a few seconds on a CPU. It imports nothing of the package; a test holds its outputs and
all its gradients equal to those of the package inside LLaVA.

F_1 … F_L are `hidden_states` of one frozen ViT, shallow to deep, without CLS. Each is a map [B, N, C], whose N cells
form a square and come row by row. LLaVA alone takes F_L. X holds the other maps one after another, [B, (L-1)*N, C].

    (1)  F_ca   = DA_cross(LN_q(F_L), LN_kv(X))                     the deep map asks the shallow maps for detail
    (2)  F_sa   = F_ca + g_self * DA_self(LN_s(F_ca), LN_s(F_ca))   the answer is refined
    (3)  F_out  = F_L + g_cross * F_sa                              [B, N, C]; the gates g start at zero: F_out = F_L
    (4)  tokens = Linear(GELU(Linear(F_out)))                       [B, N, D]; LLaVA's own MLP

(1) to (3) are the paper's, arXiv 2410.11829. DA is deformable attention, arXiv 2010.04159, equation 3:

    (5)  DA(q, v)[n] = W_out concat_h( sum over l, k of  A[n,h,l,k] * V[l,h](centre of cell n + offset[n,h,l,k]) )

Head h of cell n reads map l at k = 1 … P places. Offsets and A are linear in q[n], V is linear in v, and the weights A
of one head sum to 1. V[l,h](place) is bilinear, and zero outside the map.

`w` holds all trained weights by name. The names are those in `mm_projector.state_dict()` of a trained LLaVA.
"""

import math
from typing import Dict, List, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

Weights = Dict[str, torch.Tensor]
HEADS, POINTS = 16, 4
LAYERS = (3, 4, 5, 6, 7)  # of 8 blocks; of CLIP ViT-L's 24: 3, 8, 13, 18, 23. The last is LLaVA's own, -2


def feature_maps(tower: CLIPVisionModel, images: torch.Tensor, layers: Sequence[int] = LAYERS) -> List[torch.Tensor]:
    """F_1 … F_L, each [B, N, C], of images [B, 3, height, width]. The tower is frozen."""
    with torch.no_grad():
        hidden_states = tower(images, output_hidden_states=True).hidden_states
    return [hidden_states[layer][:, 1:] for layer in layers]  # token 0 is CLS


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def layer_norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps=1e-6)


def deformable_attention(query: torch.Tensor, value: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """Equation (5): query [B, N, C] reads the maps in value [B, levels*N, C] and becomes [B, N, C]."""
    batch, cells, width = query.shape
    side, levels = math.isqrt(cells), value.shape[1] // cells
    maps = linear(value, w, name + ".value_proj").view(batch, levels, side, side, HEADS, width // HEADS)
    offsets = linear(query, w, name + ".sampling_offsets").view(batch, cells, HEADS, levels, POINTS, 2)  # (x, y), cells
    logits = linear(query, w, name + ".attention_weights").view(batch, cells, HEADS, levels * POINTS)
    shares = logits.softmax(-1).view(batch, cells, HEADS, levels, POINTS)  # over all levels and points at once

    cell = torch.arange(cells)
    row, column = torch.div(cell, side, rounding_mode="floor"), cell % side
    centre = torch.stack([column, row], -1).view(cells, 1, 2) + 0.5  # the first cell lies between 0 and 1

    heads = []
    for h in range(HEADS):
        total = torch.zeros(())
        for level in range(levels):
            level_map = maps[:, level, :, :, h].permute(0, 3, 1, 2)  # [B, C / HEADS, side, side]
            places = centre + offsets[:, :, h, level]  # [B, N, P, 2]
            # `grid_sample` counts places from -1 to 1, from edge to edge.
            read = F.grid_sample(level_map, 2 * places / side - 1, padding_mode="zeros", align_corners=False)
            total = total + (read * shares[:, None, :, h, level]).sum(-1)  # [B, C / HEADS, N]
        heads.append(total)
    return linear(torch.cat(heads, 1).transpose(1, 2), w, name + ".output_proj")


def fuse(maps: Sequence[torch.Tensor], w: Weights) -> torch.Tensor:
    """Equations (1) to (3): L maps [B, N, C], shallow to deep, become one [B, N, C]."""
    deep, shallow = maps[-1], torch.cat(list(maps[:-1]), 1)
    query, value = layer_norm(deep, w, "fuser.query_norm"), layer_norm(shallow, w, "fuser.feat_norm")
    found = deformable_attention(query, value, w, "fuser.cross_attn")
    normed = layer_norm(found, w, "fuser.self_norm")
    found = found + w["fuser.self_gate.scale"] * deformable_attention(normed, normed, w, "fuser.self_attn")
    return deep + w["fuser.cross_gate.scale"] * found


def project(maps: Sequence[torch.Tensor], w: Weights) -> torch.Tensor:
    """Equation (4) behind the fuser: L maps [B, N, C] become the language model's tokens [B, N, D]."""
    return linear(F.gelu(linear(fuse(maps, w), w, "0")), w, "2")


def fresh_weights(width: int, tokens_width: int, num_layers: int = len(LAYERS)) -> Weights:
    """Initial values for maps of C = width and tokens of D = tokens_width."""
    w: Weights = {}
    for name, module in (("0", nn.Linear(width, tokens_width)), ("2", nn.Linear(tokens_width, tokens_width))):
        w.update({f"{name}.weight": module.weight.data, f"{name}.bias": module.bias.data})
    for norm in ("query_norm", "feat_norm", "self_norm"):
        w.update({f"fuser.{norm}.weight": torch.ones(width), f"fuser.{norm}.bias": torch.zeros(width)})
    for gate in ("cross_gate", "self_gate"):
        w[f"fuser.{gate}.scale"] = torch.zeros(width)
    for attention, levels in (("fuser.cross_attn", num_layers - 1), ("fuser.self_attn", 1)):
        for name in ("value_proj", "output_proj"):
            w[f"{attention}.{name}.weight"] = nn.init.xavier_uniform_(torch.empty(width, width))
            w[f"{attention}.{name}.bias"] = torch.zeros(width)
        samples = HEADS * levels * POINTS
        for name, rows in (("attention_weights", samples), ("sampling_offsets", 2 * samples)):
            w[f"{attention}.{name}.weight"], w[f"{attention}.{name}.bias"] = torch.zeros(rows, width), torch.zeros(rows)
        # Each head looks in its own direction. Its point k starts on the k-th ring of cells around the query's cell.
        angle = 2 * math.pi / HEADS * torch.arange(HEADS)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        ring = direction.view(HEADS, 1, 1, 2) * torch.arange(1, POINTS + 1).view(1, 1, POINTS, 1)
        w[f"{attention}.sampling_offsets.bias"] = ring.repeat(1, levels, 1, 1).flatten()
    return {name: weight.requires_grad_() for name, weight in w.items()}


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4)
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=7, **sizes)).eval()
    w = fresh_weights(width=64, tokens_width=48)
    maps = feature_maps(tower, torch.rand(2, 3, 28, 28))
    print(f"feature maps: {len(maps)} of shape {list(maps[-1].shape)}")
    print(f"starts as the identity: {torch.equal(fuse(maps, w), maps[-1])}")
    print(f"tokens for the language model: {list(project(maps, w).shape)}")

    optimizer = torch.optim.AdamW(w.values(), lr=1e-3, weight_decay=0)
    target = torch.randn(2, 16, 48)  # stands for the language model and its loss
    start, still = {name: weight.detach().clone() for name, weight in w.items()}, set(w)
    for step in (1, 2, 3):
        loss = (project(maps, w) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved = {name for name in still if not torch.equal(w[name], start[name])}
        still -= moved
        names = sorted({".".join(name.split(".")[:2]) for name in moved})
        print(f"step {step}, loss {loss:.4f}, first moves: {', '.join(names)}")
    print(f"is the identity afterwards: {torch.equal(fuse(maps, w), maps[-1])}, tensors that never moved: {len(still)}")


if __name__ == "__main__":
    main()
