"""Promises about the source tree itself."""

import ast
import subprocess
from pathlib import Path

import pytest

from llava_mmfuser.llava_patch import PATCHES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llava_mmfuser"
LEVELS = {
    "__init__": 11,
    "__main__": 10,
    "installation": 9,
    "llava_patch": 8,
    "visualize": 8,
    "convert": 8,
    "trainer": 7,
    "feature_maps": 7,
    "writing": 7,
    "projector": 6,
    "inspection": 6,
    "checkpoint": 5,
    "fusion": 4,
    "vision": 4,
    "fuser": 3,
    "attention": 2,
    "ops": 1,
    "resettable": 0,
    "config": 0,
    "pictures": 0,
    "activation": 0,
    "patching": 0,
}


def imports(path):
    """(module, is inside the package) of every import in a file, relative ones resolved to their first part."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, False
        elif isinstance(node, ast.ImportFrom):
            up = len(path.relative_to(PACKAGE).parts) if node.level else 0
            if node.level and node.level == up:
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    if name != "__version__":
                        yield name, True
            elif not node.level:
                yield node.module, node.module.split(".")[0] == "llava_mmfuser"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_dependencies_point_one_way(path):
    place = path.relative_to(PACKAGE).parts[0].replace(".py", "")
    for module, inside in imports(path):
        root = module.split(".")[0]
        if inside and root != "llava_mmfuser":
            assert LEVELS[root] < LEVELS[place] or place == root, f"{place} imports {module}"
        assert root != "llava", "LLaVA's symbols are named in llava_patch's table only"
        assert root != "triton" or place == "ops"
        assert root not in ("torch", "transformers") or place not in ("activation", "__init__", "config")


def test_only_llava_patch_names_llavas_modules():
    for path in FILES:
        if path.name not in ("llava_patch.py", "activation.py"):
            code = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            assert not any(text.startswith("llava.model") for text in code), path


def test_sources_parse_on_python_3_8():
    for path in FILES:
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_readme_lists_exactly_what_is_patched():
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `") and ":" in line.split("`")[1]]
    assert rows == [f"| `{row.target}` | {row.reason} |" for row in sum(PATCHES.values(), ())]


@pytest.mark.parametrize("script", ["pretrain.sh", "finetune.sh"])
@pytest.mark.parametrize("settings", [{}, {"SIZE": "13b"}, {"LORA": "1"}], ids=["7b", "13b", "lora"])
def test_launch_scripts_are_understood_by_upstreams_parser(world, tmp_path, script, settings):
    """Run them with a `deepspeed` that prints its arguments, and parse those with LLaVA's own argument classes."""
    import host
    import llava.train.train as upstream
    import torch
    import transformers

    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, tmp_path / "mm_projector.bin")
    stub = tmp_path / "deepspeed"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    env = host.environment(
        PATH=f"{tmp_path}:{host.os.environ['PATH']}",
        OUTPUT=str(tmp_path / "out"),
        VISION_TOWER=str(world / "clip"),
        ADAPTER=str(tmp_path / "mm_projector.bin"),
        **settings,
    )
    done = subprocess.run(["bash", ROOT / "scripts" / script], env=env, text=True, stdout=subprocess.PIPE, check=True)
    target, *flags = done.stdout.splitlines()
    assert target == "llava/train/train_mem.py"
    at = flags.index("--deepspeed")
    assert flags[at + 1] == ("./scripts/zero2.json" if script == "pretrain.sh" else "./scripts/zero3.json")
    for gpu_only in ("--deepspeed", "--bf16", "--tf32"):
        at = flags.index(gpu_only)
        del flags[at : at + 2]
    parser = transformers.HfArgumentParser(
        (upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments)
    )
    model, _, training = parser.parse_args_into_dataclasses(flags + ["--use_cpu", "True"])
    assert model.mm_projector_type == "mmfuser" and model.mm_vision_select_layer == -2
    assert model.model_name_or_path == f"lmsys/vicuna-{settings.get('SIZE', '7b')}-v1.5"
    pretrain = script == "pretrain.sh"
    assert model.mm_fuser_lr == (1e-4 if pretrain and settings.get("SIZE") == "13b" else None)
    assert model.tune_mm_mlp_adapter == pretrain and training.weight_decay == 0
    assert training.per_device_train_batch_size * 8 == (256 if pretrain else 128)
    lora = not pretrain and "LORA" in settings
    assert training.lora_enable == lora
    assert training.learning_rate == (1e-3 if pretrain else 2e-4 if lora else 2e-5)
