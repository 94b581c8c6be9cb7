import shutil

import pytest
import torch
from layouts import LAYERS, LAYOUTS, in_their_names, save
from tiny import model_with


@pytest.fixture(scope="session")
def made(world, tmp_path_factory):
    """Folder of one checkpoint per format ("ours", "theirs", "plain") and layout; for reading only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(5)
    for kind in ("ours", "plain"):
        settings = (
            dict(mm_vision_select_layer=tuple(LAYERS)) if kind == "ours" else dict(mm_projector_type="mlp2x_gelu")
        )
        model = model_with(world, **settings)
        with torch.no_grad():
            for parameter in model.get_model().mm_projector.parameters():
                parameter.uniform_(-0.3, 0.3)
        if kind == "ours":
            model.config.mm_fuser_layers, model.config.mm_vision_select_layer = LAYERS, LAYERS[-1]
        for layout in LAYOUTS:
            save(model, folder / f"{kind} {layout}", layout)
            if kind == "ours":
                shutil.copytree(folder / f"ours {layout}", folder / f"theirs {layout}")
                in_their_names(folder / f"theirs {layout}")
    return folder


@pytest.fixture
def take(made, tmp_path):
    """A copy of one of those checkpoints."""

    def copied(kind, layout, name="in"):
        return shutil.copytree(made / f"{kind} {layout}", tmp_path / name)

    return copied
