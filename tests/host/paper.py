"""The equations of arXiv 2410.11829 written out with loops, independent of the package: the tests' own definition."""

import math

import torch


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def bilinear(level_map, x, y):
    """level_map [H, W, D] read at pixel (x, y), zeros outside."""
    height, width, _ = level_map.shape
    column, row = math.floor(x.item()), math.floor(y.item())
    total = torch.zeros_like(level_map[0, 0])
    for r, c in ((row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)):
        if 0 <= r < height and 0 <= c < width:
            total = total + (1 - (x - c).abs()) * (1 - (y - r).abs()) * level_map[r, c]
    return total


def deformable_attention(query, value, p, heads, levels, points, side):
    """query [B, N, C], value [B, levels*N, C], p: parameters by name."""
    batch, tokens, width = query.shape
    depth = width // heads
    value = (value @ p["value_proj.weight"].T + p["value_proj.bias"]).view(batch, levels, side, side, heads, depth)
    offsets = query @ p["sampling_offsets.weight"].T + p["sampling_offsets.bias"]
    offsets = offsets.view(batch, tokens, heads, levels, points, 2)
    logits = query @ p["attention_weights.weight"].T + p["attention_weights.bias"]
    logits = logits.view(batch, tokens, heads, levels * points)
    rows = []
    for b in range(batch):
        for n in range(tokens):
            row, column = divmod(n, side)
            for h in range(heads):
                exponentials = torch.exp(logits[b, n, h] - logits[b, n, h].max())
                weights = (exponentials / exponentials.sum()).view(levels, points)
                total = 0
                for level in range(levels):
                    for k in range(points):
                        x, y = column + offsets[b, n, h, level, k, 0], row + offsets[b, n, h, level, k, 1]
                        total = total + weights[level, k] * bilinear(value[b, level, :, :, h], x, y)
                rows.append(total)
    out = torch.stack(rows).view(batch, tokens, width)
    return out @ p["output_proj.weight"].T + p["output_proj.bias"]


def neighbourhood_attention(query, value, p, heads, levels, reach, side):
    """Softmax attention of query [B, N, C] to all cells at most `reach` rows and columns away, in every level."""
    batch, tokens, width = query.shape
    depth = width // heads
    query, key, value = (
        (x @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"]).view(batch, -1, heads, depth)
        for name, x in (("query", query), ("key", value), ("value", value))
    )
    rows = []
    for b in range(batch):
        for n in range(tokens):
            row, column = divmod(n, side)
            near = [
                level * tokens + r * side + c
                for level in range(levels)
                for r in range(side)
                for c in range(side)
                if abs(r - row) <= reach and abs(c - column) <= reach
            ]
            for h in range(heads):
                logits = torch.stack([(query[b, n, h] * key[b, m, h]).sum() / math.sqrt(depth) for m in near])
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                rows.append(sum(weight * value[b, m, h] for weight, m in zip(weights, near)))
    out = torch.stack(rows).view(batch, tokens, width)
    return out @ p["output_proj.weight"].T + p["output_proj.bias"]


def mmfuser(layers, parameters, heads, points, self_attention=True, attention=deformable_attention):
    """layers: L tensors [B, N, C]; parameters: `MMFuser`'s, by name; points: reach, for `neighbourhood_attention`."""

    def part(prefix):
        return {name[len(prefix) :]: value for name, value in parameters.items() if name.startswith(prefix)}

    def norm(name, x):
        return layer_norm(x, parameters[name + ".weight"], parameters[name + ".bias"])

    query, side = layers[-1], math.isqrt(layers[-1].shape[1])
    value = norm("feat_norm", torch.cat(list(layers[:-1]), 1))
    fused = attention(norm("query_norm", query), value, part("cross_attn."), heads, len(layers) - 1, points, side)
    if self_attention:
        normed = norm("self_norm", fused)
        refined = attention(normed, normed, part("self_attn."), heads, 1, points, side)
        fused = fused + parameters["self_gate.scale"] * refined
    return query + parameters["cross_gate.scale"] * fused
