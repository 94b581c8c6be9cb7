"""Interchangeable attention kinds: (query [B, N, C], value [B, L*N, C], grid (H, W)) -> [B, N, C]."""

from .deformable import DeformableAttention

ATTENTION = {"deformable": DeformableAttention}
