"""vLLM's LLaVA with a fuser in front of its projector. Written for vLLM 0.32."""

from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .modeling_llava_mmfuser import LlavaMMFuserProjector, fuser_of


class _Info(LlavaProcessingInfo):
    def get_num_image_tokens(self, **size: int) -> int:
        config, tokens = self.get_hf_config(), super().get_num_image_tokens(**size)
        has_cls = config.vision_feature_select_strategy == "full"
        with torch.device("meta"):
            return fuser_of(config).num_tokens(tokens - has_cls) + has_cls


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=_Info, dummy_inputs=LlavaDummyInputsBuilder)
class LlavaMMFuserForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` for a config.json whose ``vision_feature_layer`` lists the fused layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        with self._mark_tower_model(vllm_config, "image"):
            self.multi_modal_projector = LlavaMMFuserProjector(self.config)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Any:
        return vision_tower(
            pixel_values,
            select_layers=list(self.config.vision_feature_layer),
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )
