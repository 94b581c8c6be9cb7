"""Interchangeable attention kinds. Each takes (query [B, N, C], value [B, L*N, C], grid (H, W)) and returns [B, N, C]."""

from .deformable import DeformableAttention

ATTENTION = {"deformable": DeformableAttention}
