"""Checkpoint folders of every format and layout, as files that LLaVA would read, and what may be wrong with them."""

import hashlib
import json
import os

import torch
from safetensors.torch import load_file, save_file

LAYERS = [-8, -6, -5, -3, -2]  # of a tower with 8 blocks
FULL = ["single safetensors", "sharded safetensors", "single bin", "sharded bin"]
LAYOUTS = FULL + ["adapter", "lora"]
# in the authors' published adapters
ATTENTION = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
PARTS = [f"{side}_attn.{part}" for side in ("cross", "self") for part in ATTENTION] + ["query_norm", "feat_norm"]
THEIRS = {f"fuser.{part}.{kind}": f"0.{part}.{kind}" for part in PARTS for kind in ("weight", "bias")}
THEIRS.update({f"fuser.self_norm.{kind}": f"0.norm1.{kind}" for kind in ("weight", "bias")})
THEIRS.update({f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in ("01", "23") for kind in ("weight", "bias")})
THEIRS.update({"fuser.cross_gate.scale": "0.gamma1", "fuser.self_gate.scale": "0.gamma2"})


def read(folder):
    """All tensors of a folder's model or adapter files, by file and name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found.update({(path.name, name): value for name, value in load_file(path).items()})
        elif path.suffix == ".bin" and path.name != "training_args.bin":
            state = torch.load(path, map_location="cpu", weights_only=True)
            found.update({(path.name, name): value for name, value in state.items()})
    return found


def same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype and torch.equal(value, right[key]), key
    return True


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write_json(path, content):
    path.write_text(json.dumps(content))


def change_config(folder, **changes):
    config = {**config_of(folder), **changes}
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})


def fingerprint(folder):
    """Content and time of last change of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


def in_their_names(folder):
    """Turn a folder in our format into the authors', with the table above."""
    rename = {f"mm_projector.{ours}": f"mm_projector.{theirs}" for ours, theirs in THEIRS.items()}

    def their(name):
        before, mark, rest = name.partition("mm_projector.")
        return before + rename[mark + rest] if mark else name

    for path in folder.iterdir():
        if path.suffix == ".safetensors" and path.name.startswith("model"):
            save_file({their(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
        elif path.suffix == ".bin" and not path.name.startswith(("adapter_", "training")):
            torch.save({their(name): value for name, value in torch.load(path, weights_only=True).items()}, path)
        elif path.name.endswith(".index.json"):
            index = json.loads(path.read_text())
            index["weight_map"] = {their(name): file for name, file in index["weight_map"].items()}
            write_json(path, index)
    config = {key: value for key, value in config_of(folder).items() if not key.startswith("mm_fuser_")}
    config.update(mm_projector_type="mlp2x_gelu", mm_vision_select_layer=LAYERS)
    write_json(folder / "config.json", config)


def save(model, folder, layout):
    if layout in FULL:
        shards = {"max_shard_size": "300KB"} if layout.startswith("sharded") else {}
        model.save_pretrained(folder, safe_serialization=layout.endswith("safetensors"), **shards)
    else:
        folder.mkdir()
        model.config.save_pretrained(folder)
        projector = {
            f"model.mm_projector.{n}": v.bfloat16() for n, v in model.get_model().mm_projector.state_dict().items()
        }
        if layout == "adapter":
            torch.save(projector, folder / "mm_projector.bin")
        else:
            projector["model.embed_tokens.weight"] = torch.ones(3)
            torch.save({f"base_model.model.{n}": v for n, v in projector.items()}, folder / "non_lora_trainables.bin")
            write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
            lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
            save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    torch.save({"lr": 1}, folder / "training_args.bin")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "model.safetensors").write_text("old")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("llava-mmfuser-test-was-run",)


def truncate(path, by=100):
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - by)


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    write_json(path, index)


def edit_weights(path, change):
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    change(state)
    save_file(state, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(state, path)


def without(*parts):
    def drop(state):
        for name in [name for name in state if any(part in name for part in parts)]:
            del state[name]

    return drop


def edit_header(path, change):
    """Change the JSON header of a safetensors file, and leave its data as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def entry_of(header, number=0):
    """An entry of a header by the place of its data."""
    return sorted((e for e in header.values() if "shape" in e), key=lambda e: e["data_offsets"])[number]


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


SAFE, SHARDED, BIN = "single safetensors", "sharded safetensors", "single bin"
DAMAGE = [
    # name, layout, what is done to a checkpoint of any format, message
    ("no config", SAFE, lambda f: (f / "config.json").unlink(), "has no config.json"),
    ("bad config", SAFE, lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    ("config is a list", SAFE, lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    ("shard absent", SHARDED, lambda f: first_shard(f).unlink(), "names the shard model-00001.* not there"),
    ("shard truncated", SHARDED, lambda f: truncate(first_shard(f)), "truncated or damaged"),
    ("header truncated", SAFE, lambda f: os.truncate(f / "model.safetensors", 20), "not a complete safetensors"),
    ("empty file", SAFE, lambda f: os.truncate(f / "model.safetensors", 0), "not a complete safetensors"),
    ("lfs pointer", SAFE, lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "not a complete"),
    (
        "shape of more numbers than bytes",
        SAFE,
        lambda f: edit_header(f / "model.safetensors", lambda h: entry_of(h).update(shape=[3])),
        "not a complete safetensors file, .* invalid shape, data type, or offset",
    ),
    (
        "overlap",
        SAFE,
        lambda f: edit_header(
            f / "model.safetensors", lambda h: entry_of(h, 1).update(data_offsets=entry_of(h)["data_offsets"])
        ),
        "not a complete safetensors file, .* invalid ",
    ),
    (
        "unknown dtype",
        SAFE,
        lambda f: edit_header(f / "model.safetensors", lambda h: entry_of(h).update(dtype="F31")),
        "unknown variant `F31`, expected one of `BOOL`",
    ),
    ("bin truncated", BIN, lambda f: truncate(f / "pytorch_model.bin"), "cannot be read as tensors"),
    ("adapter truncated", "adapter", lambda f: truncate(f / "mm_projector.bin"), "cannot be read as tensors"),
    ("pickle", BIN, lambda f: torch.save({"a": Malicious()}, f / "pytorch_model.bin"), "could run code"),
    ("no tensors", BIN, lambda f: torch.save({"a": 1}, f / "pytorch_model.bin"), "not a state dict"),
    ("no weights", SAFE, lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    ("index no JSON", SHARDED, lambda f: (f / "model.safetensors.index.json").write_text("?"), "is not JSON"),
    ("index without map", SHARDED, lambda f: edit_index(f, lambda i: i.pop("weight_map")), "not an index of shards"),
    (
        "index leads out",
        SHARDED,
        lambda f: edit_index(f, lambda i: i["weight_map"].update(a="../x.bin")),
        "same folder",
    ),
    (
        "index names more",
        SHARDED,
        lambda f: edit_index(f, lambda i: i["weight_map"].update(a=first_shard(f).name)),
        "disagree about a",
    ),
    (
        "no LoRA weights",
        "lora",
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_config.json, but neither",
    ),
    (
        "no projector",
        SAFE,
        lambda f: edit_weights(f / "model.safetensors", without("mm_projector")),
        "no weights of a projector",
    ),
    ("misshapen", SAFE, lambda f: change_config(f, hidden_size=65), r"is \[64\] instead of \[65\]"),
    (
        "unexpected",
        SAFE,
        lambda f: edit_weights(
            f / "model.safetensors", lambda s: s.update({"model.mm_projector.9.bias": torch.ones(1)})
        ),
        "unexpected 9.bias",
    ),
    ("no width", SAFE, lambda f: change_config(f, hidden_size=None), "hidden_size=None"),
    (
        "no LLaVA",
        SAFE,
        lambda f: (f / "config.json").write_text('{"hidden_size": 64}'),
        "neither mm_vision_tower nor mm_projector_type|it must be|mm_vision_select_layer=None",
    ),
]
