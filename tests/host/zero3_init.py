"""Run by test_training: a fuser made, loaded without weights and stepped under ZeRO-3 (one rank, CPU)."""

import sys
import tempfile

import deepspeed
import deepspeed_cpu  # noqa: F401  the CPU work-arounds
import torch
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from llava_mmfuser import MMFuser

world = sys.argv[1]
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
deepspeed.init_distributed("gloo")
config = LlavaConfig.from_pretrained(world + "/llama")
config.update(
    dict(
        mm_projector_type="mmfuser",
        mm_hidden_size=64,
        mm_vision_select_layer=-2,
        mm_vision_tower=world + "/clip",
        mm_fuser_layers=[3, 4, 5, 6, 7],
    )
)
with tempfile.TemporaryDirectory() as folder:
    LlavaLlamaForCausalLM(config).save_pretrained(folder)
    keep = HfDeepSpeedConfig(settings)
    LlavaLlamaForCausalLM.from_pretrained(folder)
    for changes in (dict(mm_fuser_num_points=2), dict(mm_projector_type="mlp2x_gelu")):
        edited = LlavaConfig.from_pretrained(folder)
        edited.update(changes)
        try:
            LlavaLlamaForCausalLM.from_pretrained(folder, config=edited)
        except ValueError as error:
            assert "undo what was changed in config.json" in str(error) or "the weights hold a fuser" in str(error), (
                error
            )
        else:
            raise AssertionError(changes)

model = LlavaLlamaForCausalLM.from_pretrained(world + "/llama", config=config)
fuser = model.get_model().mm_projector.fuser
assert all(parameter.ds_numel and parameter.numel() == 0 for parameter in fuser.parameters()), "partitioned"
fresh = MMFuser(64).state_dict()
with deepspeed.zero.GatheredParameters(list(fuser.parameters())):
    for name, parameter in fuser.named_parameters():
        assert parameter.isfinite().all(), name
        if "_proj.weight" in name:
            assert 0 < parameter.abs().max() <= fresh[name].abs().max() * 1.02, name
        else:
            assert torch.allclose(parameter.data, fresh[name]), name

model.get_vision_tower().load_model()
engine = deepspeed.initialize(
    model=model,
    model_parameters=[p for p in model.parameters() if p.requires_grad],
    optimizer=None,
    config={
        **settings,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    },
)[0]
ids = torch.tensor([[1, -200, 5, 6]])
losses = []
for _ in range(3):
    loss = engine(input_ids=ids, labels=ids.clamp(min=0), images=torch.ones(1, 3, 28, 28)).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
with deepspeed.zero.GatheredParameters(list(fuser.parameters())):
    assert fuser.cross_gate.scale.abs().min() > 0
assert losses[-1] < losses[0], losses
