"""Capture of several ViT layers, with early exit. Knows transformers' CLIP, not LLaVA."""

from typing import Any, Sequence

import torch

SELECT_FEATURES = ("patch", "cls_patch")


def select_tokens(hidden_state: torch.Tensor, select_feature: str) -> torch.Tensor:
    """LLaVA's ``mm_vision_select_feature``: drop CLS from [B, 1+N, C] (``patch``) or keep it (``cls_patch``).

    Raises:
        ValueError: another select_feature.
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(
            f"mm_vision_select_feature={select_feature!r} is not allowed; use {' or '.join(SELECT_FEATURES)}"
        )
    return hidden_state[:, 1:] if select_feature == "patch" else hidden_state


@torch.no_grad()
def capture_layers(
    model: Any, pixel_values: torch.Tensor, layers: Sequence[int], select_feature: str, dtype: torch.dtype
) -> torch.Tensor:
    """Run a `CLIPVisionModel` up to the deepest requested layer and keep only the requested maps.

    The maps equal ``model(pixel_values, output_hidden_states=True).hidden_states[i]`` bit for bit; later blocks are not
    computed. Blocks are called one by one, so hooks that DeepSpeed or accelerate put on them run as usual.

    Args:
        model: transformers' `CLIPVisionModel`.
        pixel_values: [B, 3, image_size, image_size] in the model's dtype and device.
        layers: ascending, non-negative `hidden_states` indices; 0 is the embedding output.
        select_feature: ``patch`` or ``cls_patch``.
        dtype: of the result.

    Returns:
        [B, N, L*C]: the maps side by side on the channel axis, in the order of `layers`.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
    out = None
    for index in range(layers[-1] + 1):
        if index > 0:
            hidden = vision.encoder.layers[index - 1](hidden, attention_mask=None, causal_attention_mask=None)[0]
        if index in layers:
            tokens = select_tokens(hidden, select_feature)
            if out is None:
                out = torch.empty(
                    *tokens.shape[:2], len(layers), tokens.shape[2], dtype=dtype, device=pixel_values.device
                )
            out[:, :, layers.index(index)] = tokens
    return out.flatten(2)


def concat_layers(hidden_states: Sequence[torch.Tensor], layers: Sequence[int], select_feature: str) -> torch.Tensor:
    """The same [B, N, L*C] from all `hidden_states` of a model, for callers that already have them."""
    return torch.cat([select_tokens(hidden_states[index], select_feature) for index in layers], dim=-1)
