"""Arguments of training that only LLaVA-NeXT has."""

from typing import Any, List, Optional

from ..config import read_setting

ADAPTER_PART = "mm_mlp_adapter"  # name of the projector in its mm_tunable_parts


def tunable_parts(source: Any) -> Optional[List[str]]:
    """``mm_tunable_parts``, or None. If they are given, LLaVA-NeXT trains exactly these parts.

    Args:
        source: `ModelArguments`, a LLaVA config or a config.json (dict).
    """
    parts = read_setting(source, "mm_tunable_parts")
    return None if parts is None else parts.split(",")


def trains_the_adapter_alone(source: Any) -> bool:
    """Whether LLaVA-NeXT saves an adapter alone; its own test is the same."""
    parts = tunable_parts(source) or []
    return len(parts) == 1 and any(name in parts[0] for name in (ADAPTER_PART, "mm_vision_resampler"))


def refuse_token_concat(model_args: Any) -> None:
    """Refuse the fusion ``token_concat`` in LLaVA-NeXT, where ``mm_spatial_pool_mode`` always has a value."""
    pooling = read_setting(model_args, "mm_spatial_pool_mode")
    if pooling is not None:
        raise ValueError(
            f"mm_spatial_pool_mode={pooling} together with mm_fuser_fusion=token_concat is not supported, because "
            f"LLaVA-NeXT would pool its tokens as those of one square map; use another mm_fuser_fusion"
        )
