"""vLLM's LLaVA with a fuser in front of its projector. Written for vLLM 0.32."""

from typing import Any

from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from .modeling_llava_mmfuser import LlavaMMFuserProjector


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
