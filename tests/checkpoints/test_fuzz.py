"""Damaged configs, headers and index files, made at random from a seed: commands answer in one line, and `inspect` says
yes only to what LLaVA loads."""

import json
import random
import shutil

import pytest
from layouts import LAYOUTS, SAFE, SHARDED, config_of, write_json
from llava.model import LlavaLlamaForCausalLM
from safetensors import safe_open

COMMANDS = (["convert"], ["convert", "--to", "authors"], ["upgrade"], ["export"])
KEYS = (
    *("mm_projector_type", "mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size"),
    *("hidden_size", "mm_fuser_layers", "mm_fuser_projector", "mm_fuser_fusion", "mm_fuser_attention", "model_type"),
    *("mm_fuser_self_attention", "mm_fuser_num_heads", "mm_fuser_num_points", "mm_fuser_window_size", "s2"),
    *("mm_resampler_type", "mm_tunable_parts", "vision_config", "auto_map", "image_aspect_ratio"),
)
VALUES = (
    *(None, True, False, 0, 1, -2, 7, 64, 1 << 70, 1.5, float("nan"), "", "x", "7", "linear", "mlp2x_gelu", "mmfuser"),
    *("mlp99x_gelu", "uniform", "all", "list-2", "3,4,5,6,7", "[", "\udc80", "sum", "window", "/", [], [1], [3, 7]),
    *([3, 4, 5, 6, 7], [-8, -6, -5, -3, -2], ["a"], [None], [[]], {}, {"a": {}}, "cls_patch", "llava", "llava_llama"),
)


def odd_config(rng, folder):
    """Change or remove up to three settings."""
    config = config_of(folder)
    for key in rng.sample(KEYS, rng.randrange(1, 4)):
        config[key] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del config[key]
    write_json(folder / "config.json", config)


def odd_header(rng, folder):
    """Change one entry of a header, or some of its bytes."""
    path = rng.choice(sorted(folder.glob("model*.safetensors")))
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name, kind = rng.choice(sorted(set(header) - {"__metadata__"})), rng.randrange(4)
    entry, (begin, end) = header[name], header[name]["data_offsets"]
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(8 + length)] = rng.randrange(256)
        path.write_bytes(data)
        return
    if kind == 1:
        offsets = [[begin, end + 1], [begin + 1, end], [0, 0], [0, end - begin], [end, begin], [begin], [0, 1 << 70]]
        shapes = [[], [1], [-1, -end], [True], ["a"], [1 << 62, 4], [0], None, {}, [1.0], entry["shape"] * 2]
        odd = {"dtype": ["F16", "U8", "F4", "X", None, 3, []], "shape": shapes, "data_offsets": offsets}
        change = rng.choice(sorted(odd))
        entry[change] = rng.choice(odd[change])
    elif kind == 2:
        odd = [None, 3, [], {}, "x", {"dtype": "F32"}, {"format": 3}, {"format": "pt"}]
        header[rng.choice([name, "__metadata__"])] = rng.choice(odd)
    else:
        new = rng.choice(["a", "__metadata__", "model.mm_projector.9.bias", "mm_projector.", "\u2028"])
        header[new] = header.pop(name)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def odd_index(rng, folder):
    """Change one entry of an index, or all of it."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = rng.choice(sorted(index["weight_map"]))
    value = rng.choice([*VALUES, "../x.bin", "model.safetensors", "config.json", *index["weight_map"].values()])
    changes = [
        lambda: index["weight_map"].update({name: value}),
        lambda: index["weight_map"].pop(name),
        lambda: index["metadata"].update(total_size=value),
        lambda: index.update(metadata=value),
        lambda: index.update(weight_map=value),
        lambda: index.update(weight_map={}),
    ]
    rng.choice(changes)()
    write_json(path, index if rng.random() < 0.9 else value)


@pytest.mark.parametrize("damage", [odd_config, odd_header, odd_index])
def test_damaged_files_are_told_in_one_line_and_never_said_to_load_if_they_do_not(made, tmp_path, cli, damage):
    rng, codes = random.Random(damage.__name__), set()
    for number in range(40):
        layout = {odd_header: rng.choice([SAFE, SHARDED]), odd_index: SHARDED}.get(damage, rng.choice(LAYOUTS))
        source = made / f"{rng.choice(['ours', 'ours', 'theirs', 'plain'])} {layout}"
        folder, out = shutil.copytree(source, tmp_path / f"llava-{number}"), tmp_path / "out"
        damage(rng, folder)
        code, lines, err = cli("inspect", folder)
        verdict = lines.splitlines()[-1]
        assert err == "" and "a fault of" not in verdict, verdict
        assert verdict.startswith("loads: no" if code else "loads: yes")
        codes.add(code)
        if code == 0 and layout not in ("adapter", "lora"):
            for path in folder.glob("*.safetensors"):
                with safe_open(path, framework="pt") as file:
                    assert all(file.get_tensor(name) is not None for name in file.keys())
            LlavaLlamaForCausalLM.from_pretrained(folder)
        command, *options = rng.choice(COMMANDS)
        code, _, err = cli(command, folder, out, *options)
        assert out.exists() == (code == 0) and err.count("\n") == code, err
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert codes == {0, 1}
