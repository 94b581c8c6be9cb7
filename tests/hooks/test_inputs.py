"""Every shape in which LLaVA 1.5 and 1.6 hand pictures to the model: answers before the first step, gradients after."""

import pytest
import torch
from tiny import arguments, model_with

IMAGE = -200
TILED = dict(image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])
SIZES = [(56, 50), (20, 50)]  # of two pictures, odd on purpose: 2 x 2 tiles and 1 x 2


def pictures(*tiles):
    return [torch.rand(*((count,) if count else ()), 3, 28, 28) for count in tiles]


# name -> what the config has, token ids, pictures
TWO, BOTH, TEXT = [[1, IMAGE, 5, 6], [1, IMAGE, 7, 8]], [[1, IMAGE, 5, IMAGE, 6]], [[1, 5, 6, 7]]
INPUTS = {
    "tensor": ({}, TWO, lambda: torch.rand(2, 3, 28, 28)),
    "list": ({}, TWO, lambda: pictures(0, 0)),
    "several pictures in a sample": ({}, BOTH, lambda: pictures(0, 0)),
    "several pictures, and one, and none": (
        {},
        [[1, IMAGE, IMAGE, 5], [1, IMAGE, 6, 7], [1, 2, 3, 4]],
        lambda: pictures(0, 0, 0, 0),
    ),
    "text alone": ({}, TEXT, lambda: torch.zeros(1, 3, 28, 28)),
    "frames of a video": ({}, [[1, IMAGE, 5, 6]], lambda: pictures(4)),
    "five dimensions": ({}, TWO, lambda: torch.rand(2, 3, 3, 28, 28)),
    "cls_patch": (dict(mm_vision_select_feature="cls_patch"), TWO, lambda: torch.rand(2, 3, 28, 28)),
    "cls_patch, list": (dict(mm_vision_select_feature="cls_patch"), BOTH, lambda: pictures(0, 0)),
    **{
        f"anyres, {kind}": ({**TILED, "mm_patch_merge_type": kind}, ids, lambda: pictures(5, 3))
        for kind, ids in (("flat", TWO), ("spatial", TWO), ("spatial_unpad", TWO))
    },
    "anyres, in a sample": ({**TILED, "mm_patch_merge_type": "spatial_unpad"}, BOTH, lambda: pictures(5, 3)),
    "anyres, one tile": ({**TILED, "mm_patch_merge_type": "spatial_unpad"}, TWO, lambda: pictures(1, 1)),
}
OF_MODEL = ("mm_vision_select_feature", "mm_patch_merge_type")


@pytest.mark.parametrize("name", INPUTS)
def test_released_llava_answers_alike_and_its_fuser_learns(world, name):
    config, ids, images = INPUTS[name]
    given = {key: config[key] for key in OF_MODEL if key in config}
    model = model_with(world, mm_projector_type="mlp2x_gelu", **given).eval()
    model.config.update(config)
    model.config.pad_token_id = 0
    ids, images = torch.tensor(ids), images()
    inputs = dict(images=images, image_sizes=SIZES)

    def answers():
        with torch.no_grad():
            return model(ids, **inputs).logits, model.generate(ids, do_sample=False, max_new_tokens=3, **inputs)

    before = answers()
    model.get_model().initialize_vision_modules(arguments(world, **given))
    for found, expected in zip(answers(), before):
        assert torch.equal(found, expected)
    projector = model.get_model().mm_projector
    with torch.no_grad():
        for parameter in projector.fuser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    labels = torch.where(ids == IMAGE, -100, ids)
    model.train()(ids, labels=labels, **inputs).loss.backward()
    gradients = {name: parameter.grad for name, parameter in projector.fuser.named_parameters()}
    assert all(value is not None and value.isfinite().all() for value in gradients.values())  # each rank, each step
    changed = not torch.equal(answers()[0], before[0])
    assert changed == (name != "text alone") == any(value.any() for value in gradients.values())
