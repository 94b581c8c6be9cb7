"""What only LLaVA-NeXT has among the arguments of training."""

from typing import Any, List, Optional

from ..config import read_setting

ADAPTER_PART = "mm_mlp_adapter"  # what its mm_tunable_parts calls the projector


def tunable_parts(source: Any) -> Optional[List[str]]:
    """Its ``mm_tunable_parts``, which decide alone what is trained where they are given; None where they are not.

    Args:
        source: `ModelArguments`, a LLaVA config or a config.json (dict).
    """
    parts = read_setting(source, "mm_tunable_parts")
    return None if parts is None else parts.split(",")


def trains_the_adapter_alone(source: Any) -> bool:
    """Whether it saves an adapter, which it asks in the same words."""
    parts = tunable_parts(source) or []
    return len(parts) == 1 and any(name in parts[0] for name in (ADAPTER_PART, "mm_vision_resampler"))


def refuse_token_concat(model_args: Any) -> None:
    """Refuse the fusion ``token_concat`` with its ``mm_spatial_pool_mode``, a flag with a default."""
    pooling = read_setting(model_args, "mm_spatial_pool_mode")
    if pooling is not None:
        raise ValueError(
            f"mm_spatial_pool_mode={pooling} together with mm_fuser_fusion=token_concat is not supported, because "
            f"LLaVA-NeXT would pool its tokens as those of one square map; use another mm_fuser_fusion"
        )
