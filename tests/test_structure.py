"""Promises about the source tree itself."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llava_mmfuser"
# room -> the rooms it may import from; a file at the front door is a room of its own
ROOMS = {
    "block": {},
    "layers": {"block"},
    "config": {"block", "layers"},
    "names": {"block", "config", "layers"},
    "patching": {},
    "towers": {"block", "config"},
    "hidden_states": {"block", "config", "patching", "towers"},
    "projector": {"block", "config", "names"},
    "checkpoints": {"block", "config", "layers", "names", "towers", "__init__"},
    "hooks": {
        "block",
        "config",
        "layers",
        "names",
        "towers",
        "hidden_states",
        "projector",
        "checkpoints",
        "patching",
        "export",
    },
    "llava_patch": {"config", "hooks", "patching"},
    "activation": {"llava_patch"},
    "installation": {"block", "llava_patch", "patching"},
    "export": {"block", "config", "layers", "names", "towers", "checkpoints"},
    "visualize": {"block", "config", "layers", "names", "towers", "hidden_states", "checkpoints"},
    "__main__": {
        "activation",
        "block",
        "config",
        "layers",
        "names",
        "installation",
        "patching",
        "towers",
        "checkpoints",
        "visualize",
        "export",
    },
    "__init__": {},
}


def imports(path):
    """(room, or module outside the package, whether it is inside) of every import in a file."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, False
        elif isinstance(node, ast.ImportFrom):
            module = [*package[: -node.level], *filter(None, [node.module])] if node.level else node.module.split(".")
            module = ".".join(map(str, module)).split(".")
            if module[0] != "llava_mmfuser":
                yield ".".join(module), False
            elif len(module) > 1:
                yield module[1], True
            else:
                for alias in node.names:
                    yield "__init__" if alias.name == "__version__" else alias.name, True


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_rooms_import_only_from_where_they_may(path):
    room = path.relative_to(PACKAGE).parts[0].replace(".py", "")
    for module, inside in imports(path):
        root = module.split(".")[0]
        if inside:
            assert module == room or module in ROOMS[room], f"{room} imports {module}"
        assert root != "llava", "LLaVA's symbols are named in llava_patch's table and its hooks only"
        assert root != "triton" or path.name == "sampling_triton.py"
        assert root not in ("torch", "transformers") or room not in ("activation", "__init__", "config", "layers")
        assert room != "block" or inside or root in {"torch", "triton", *sys.stdlib_module_names}, module


def test_block_travels_without_the_rest(tmp_path):
    """An export copies it as it is: it works elsewhere, under another name, where llava_mmfuser cannot be imported."""
    shutil.copytree(PACKAGE / "block", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import sys
sys.modules["llava_mmfuser"] = None
import torch
from elsewhere.kinds import ATTENTION_KINDS, FUSIONS
from elsewhere.rivals import build_fusion
layers = [torch.randn(2, 16, 32, requires_grad=True) for _ in range(3)]
for fusion in FUSIONS:
    for attention in ATTENTION_KINDS:
        fuser = build_fusion(fusion, 32, 3, 8, num_heads=4, attention=attention)
        fuser(layers).sum().backward()
        assert not FUSIONS[fusion].starts_as_identity or torch.equal(fuser(layers), layers[-1])
print("travels")
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout == "travels\n", done.stderr


def test_only_llava_patch_names_llavas_modules():
    for path in FILES:
        if path.name not in ("llava_patch.py", "activation.py") and path.parent.name != "hooks":
            code = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            assert not any(text.startswith(("llava.model", "llava.train")) for text in code), path


def test_sources_parse_on_python_3_8():
    for path in FILES:
        ast.parse(path.read_text(), feature_version=(3, 8))


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
    assert getattr(model, "mm_fuser_lr", None) == (1e-4 if pretrain and settings.get("SIZE") == "13b" else None)
    assert model.tune_mm_mlp_adapter == pretrain and training.weight_decay == 0
    assert training.per_device_train_batch_size * 8 == (256 if pretrain else 128)
    lora = not pretrain and "LORA" in settings
    assert training.lora_enable == lora
    assert training.learning_rate == (1e-3 if pretrain else 2e-4 if lora else 2e-5)
