"""LLaVA with a fuser in front of its projector, for transformers: what an exported folder carries beside the block.

In the folder every file lies beside this one and is imported with one dot. Only transformers' public classes are
subclassed; what differs from its LLaVA is ``multi_modal_projector``.
"""

from typing import TYPE_CHECKING, Any  # noqa: F401  (an exported copy has more imports at its end)

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.activations import ACT2FN

from ..block.fusion import Fusion
from ..block.leaves import Resettable, reset
from ..block.rivals import build_fusion


class LlavaMMFuserConfig(LlavaConfig):
    """`LlavaConfig` whose ``vision_feature_layer`` lists the fused layers: shallow first, the query last.

    All settings of the fuser are in config.json, as ``mm_fuser_NAME``.
    """


def fuser_of(config: LlavaConfig) -> Fusion:
    """A fresh fuser of a config.json's settings, every one of which is handed on under its own name."""
    settings = {name[len("mm_fuser_") :]: value for name, value in vars(config).items() if name[:9] == "mm_fuser_"}
    settings.update(hidden_size=config.vision_config.hidden_size, num_layers=len(config.vision_feature_layer))
    del settings["projector"]
    return build_fusion(out_features=config.text_config.hidden_size, **settings)


class LlavaMMFuserProjector(nn.Module):
    """``linear_N(gelu(… linear_1(fuser(layers))))`` from [B, N, L*C], or [B, 1+N, L*C] with CLS, to [B, N, D]."""

    linear_1: nn.Linear

    def __init__(self, config: LlavaMMFuserConfig):
        super().__init__()
        kind = config.mm_fuser_projector
        self.depth = 1 if kind == "linear" else int(kind[len("mlp") : -len("x_gelu")])
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.fuser = fuser_of(config)
        self.act = ACT2FN[config.projector_hidden_act]
        for number in range(1, self.depth + 1):
            linear = nn.Linear(width if number == 1 else out, out, bias=config.multimodal_projector_bias)
            self.add_module(f"linear_{number}", linear)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden = self.fuser.project(image_features, self.linear_1)
        for number in range(2, self.depth + 1):
            hidden = getattr(self, f"linear_{number}")(self.act(hidden))
        return hidden


def reset_missing(module: nn.Module) -> bool:
    """Give weights of the fuser that were not loaded their initial values; returns whether it is a module of the fuser.

    Without this, weights that a folder lacks would be what lay in memory.
    """
    if isinstance(module, Resettable):
        own = module.named_parameters(recurse=False)
        reset(module, [name for name, value in own if not getattr(value, "_is_hf_initialized", False)])
    return isinstance(module, Resettable)


class _InitialValues(LlavaPreTrainedModel):
    config_class = LlavaMMFuserConfig

    def _init_weights(self, module: nn.Module) -> None:
        if not reset_missing(module):
            super()._init_weights(module)


class LlavaMMFuserModel(_InitialValues, LlavaModel):
    def __init__(self, config: LlavaMMFuserConfig):
        super().__init__(config)
        self.multi_modal_projector = LlavaMMFuserProjector(config)
        self.post_init()


class LlavaMMFuserForConditionalGeneration(_InitialValues, LlavaForConditionalGeneration):
    def __init__(self, config: LlavaMMFuserConfig, *args: Any):
        LlavaPreTrainedModel.__init__(self, config, *args)  # its parent's would build a second language model
        self.model = LlavaMMFuserModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
