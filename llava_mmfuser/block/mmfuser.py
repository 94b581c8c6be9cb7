"""MMFuser, the block of arXiv 2410.11829."""

import math
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch import nn

from .attention import build_attention
from .fusion import Fusion
from .kinds import MAX_LAYERS, MAX_WIDTH, check_count, check_num_heads, check_settings
from .leaves import Gate, LayerNorm, Linear, ZeroLinear

# authors' name -> ours; every other name is the same
PUBLISHED_NAMES = {
    "gamma1": "cross_gate.scale",
    "gamma2": "self_gate.scale",
    "norm1.weight": "self_norm.weight",
    "norm1.bias": "self_norm.bias",
}


class MMFuser(Fusion):
    """Enriches the deepest of several feature maps of one ViT with the detail of the shallower ones.

    With F_1 … F_L the maps, shallow to deep, and X the first L-1 of them::

        F_ca  = cross_attn(query_norm(F_L), feat_norm(X))          one attention level per shallow map
        F_sa  = F_ca + self_gate * self_attn(self_norm(F_ca), self_norm(F_ca))
        F_out = F_L + cross_gate * F_sa

    Both gates start at zero, so a fresh block returns F_L exactly. This is the paper's. With ``output="columns"`` there
    is no cross_gate: F_out = F_L, and the projector's first layer reads F_sa through columns of its own::

        first_layer([F_L, F_sa]) = W F_L + b + columns F_sa

    The columns start at zero, so a fresh block changes nothing either, and cross_attn starts at the query's own cell.

    `load_state_dict` also takes the names of the authors' published adapters, with or without their prefix ``0.``.

    Args:
        hidden_size: width C of every feature map.
        num_layers: number of feature maps L, at least 2.
        num_heads: attention heads; must divide hidden_size.
        num_points: sampling points per head and level of deformable attention, at least 1.
        attention: attention kind, one of `kinds.ATTENTION_KINDS`.
        self_attention: False leaves out self_norm, self_attn and self_gate (F_sa = F_ca).
        window_size: side of the neighbourhood of window attention, odd.
        output: ``add`` or ``columns``: how F_sa enters.
        start: ``identity``, or ``open``: cross_gate starts at one, or the columns are drawn at random, and cross_attn
            starts at the query's own cell. A fresh block then changes what the projector reads.
        out_features: width of the projector's first layer, for ``columns``.

    Raises:
        ValueError: a setting that is not allowed, named with its value.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 5,
        num_heads: int = 16,
        num_points: int = 4,
        attention: str = "deformable",
        self_attention: bool = True,
        window_size: int = 3,
        output: str = "add",
        start: str = "identity",
        out_features: int = 0,
    ):
        check_count(num_layers, MAX_LAYERS, "num_layers", least=2)
        own: Dict[str, Any] = {"num_points": num_points, "window_size": window_size}
        choices = dict(attention=attention, self_attention=self_attention, output=output, start=start)
        check_settings(dict(num_heads=num_heads, **choices, **own))
        check_num_heads(hidden_size, num_heads)
        super().__init__(hidden_size, num_layers)
        self.query_norm = LayerNorm(hidden_size, eps=1e-6)
        self.feat_norm = LayerNorm(hidden_size, eps=1e-6)
        self.acts_in_first_layer = output == "columns"
        near = self.acts_in_first_layer or start == "open"
        self.cross_attn = build_attention(attention, hidden_size, num_layers - 1, num_heads, near, **own)
        if self.acts_in_first_layer:
            check_count(out_features, MAX_WIDTH, "out_features")
            self.columns = (ZeroLinear if start == "identity" else Linear)(hidden_size, out_features, bias=False)
        else:
            self.cross_gate = Gate(hidden_size, start=float(start == "open"))
        if self_attention:
            self.self_norm = LayerNorm(hidden_size, eps=1e-6)
            self.self_attn = build_attention(attention, hidden_size, 1, num_heads, **own)
            self.self_gate = Gate(hidden_size)
        self.self_attention = self_attention

    def forward(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse feature maps.

        Args:
            layers: num_layers tensors [B, N, C], shallow first, the query last; N = side * side, row-major, no CLS.

        Returns:
            [B, N, C] in the dtype of the query.

        Raises:
            ValueError: another number of maps, maps of unequal shape or another width, or N that is not a square.
        """
        if self.acts_in_first_layer:
            return layers[-1].contiguous()  # as without a fuser: a matrix product's rounding depends on the strides
        return self.cross_gate(layers[-1], self.detail(layers))

    def to_first_layer(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.columns(self.detail(layers))

    def detail(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """F_sa, what the block adds or the columns read: [B, N, C]."""
        grid = self._grid(layers)
        query = layers[-1]
        shallow = torch.stack(tuple(layers[:-1]), dim=1).flatten(1, 2)  # [B, (L-1)*N, C]
        fused = self.cross_attn(query, shallow, grid, self.query_norm, self.feat_norm)
        if self.self_attention:
            normed = self.self_norm(fused)
            fused = self.self_gate(fused, self.self_attn(normed, normed, grid))
        return fused

    def gate(self) -> nn.Parameter:
        return self.columns.weight if self.acts_in_first_layer else self.cross_gate.scale

    def samples(self, layers: Sequence[torch.Tensor]) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        samples = getattr(self.cross_attn, "samples", None)
        return None if samples is None else samples(self.query_norm(layers[-1]), self._grid(layers))

    def _grid(self, layers: Sequence[torch.Tensor]) -> Tuple[int, int]:
        """Rows and columns of these maps, which are refused unless they fit this block."""
        if len(layers) != self.num_layers:
            raise ValueError(
                f"got {len(layers)} feature maps, but this fuser was built for num_layers={self.num_layers}"
            )
        query = layers[-1]
        alike = all(layer.shape == query.shape for layer in layers)  # holds for the sizes of a trace, which are tensors
        if not alike or query.dim() != 3 or query.shape[-1] != self.hidden_size:
            shapes = [tuple(layer.shape) for layer in layers]
            raise ValueError(f"every feature map must be [B, N, {self.hidden_size}] and alike, got {shapes}")
        side = math.isqrt(query.shape[1])
        if side * side != query.shape[1]:
            raise ValueError(
                f"a feature map of {query.shape[1]} tokens is not square; give patch tokens only "
                f"(side * side of them, CLS dropped)"
            )
        return side, side

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix == "" and not any(key.split(".")[0] in self._modules for key in state_dict):
            for key in [key for key in state_dict if key.startswith("0.")]:
                state_dict[key[2:]] = state_dict.pop(key)
        for theirs, ours in PUBLISHED_NAMES.items():
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)
