"""Start x route: where a run begins, and what is done with it. The table in docs/checkpoints.md, every cell run here.

Training runs at learning rate 0, so that what was loaded is what is saved, bit for bit.
"""

import json
import shutil
import sys

import host
import pytest
import torch
from llava.model.builder import load_pretrained_model
from safetensors.torch import load_file, save_file

from llava_mmfuser import MMFuser

ROOT = host.ROOT
STARTS = ("Vicuna", "released full", "released LoRA", "our adapter", "MLP adapter", "authors' adapter", "authors' full")
ADAPTERS = ("our adapter", "MLP adapter", "authors' adapter")
TRAINING = ("pretrain", "finetune", "LoRA", "QLoRA", "ZeRO-2", "ZeRO-3")
LOADING = ("load full", "load base+adapter", "load LoRA", "merge", "8-bit", "4-bit")
FIRST_MERGE = "train.py takes no base model beside a LoRA: merge it first, then as released full"
IMPOSSIBLE = {("released LoRA", route): FIRST_MERGE for route in TRAINING}
IMPOSSIBLE[("Vicuna", "load full")] = IMPOSSIBLE[("Vicuna", "load base+adapter")] = "it has no projector"
IMPOSSIBLE[("released LoRA", "load full")] = "merge it, or load it with its base"
IMPOSSIBLE.update({(start, "load full"): "an adapter needs its base model" for start in ADAPTERS})
IMPOSSIBLE.update(
    {(start, "load base+adapter"): "not an adapter" for start in ("released full", "released LoRA", "authors' full")}
)
# authors' name -> ours, in the adapters that they published
FROM_AUTHORS = {
    "0.gamma1": "fuser.cross_gate.scale",
    "0.gamma2": "fuser.self_gate.scale",
    "0.norm1.weight": "fuser.self_norm.weight",
    "0.norm1.bias": "fuser.self_norm.bias",
    **{f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in ((1, 0), (3, 2)) for kind in ("weight", "bias")},
}
TO_AUTHORS = {ours: theirs for theirs, ours in FROM_AUTHORS.items()}


MARKS = {
    **dict.fromkeys(("ZeRO-2", "ZeRO-3"), (pytest.mark.deepspeed_cpu, pytest.mark.slow)),
    **dict.fromkeys(("QLoRA", "8-bit", "4-bit"), (pytest.mark.bitsandbytes, pytest.mark.slow)),
    **dict.fromkeys(("load full", "load base+adapter", "load LoRA", "merge"), (pytest.mark.fp16_cpu,)),
}


# A start for each route that also runs on LLaVA's pins.
FOR_ALL = {"pretrain": "MLP adapter", "finetune": "authors' full", "LoRA": "our adapter"}


def marks(start, route):
    chosen = FOR_ALL.get(route) == start
    return [*MARKS.get(route, ()), *([] if chosen else [pytest.mark.matrix])]


def cells(routes):
    return [
        pytest.param(start, route, id=f"{start} - {route}", marks=marks(start, route))
        for route in routes
        for start in STARTS
        if (start, route) not in IMPOSSIBLE
    ]


def table():
    """The table of docs/checkpoints.md."""
    reasons, lines = [], []
    for start in STARTS:
        row = []
        for route in TRAINING + LOADING:
            reason = IMPOSSIBLE.get((start, route))
            if reason and reason not in reasons:
                reasons.append(reason)
            row.append("–" + "¹²³⁴⁵"[reasons.index(reason)] if reason else "yes")
        lines.append(f"| {start} | {' | '.join(row)} |")
    head = f"| start | {' | '.join(TRAINING + LOADING)} |"
    notes = "; ".join(f"{'¹²³⁴⁵'[number]} {reason}" for number, reason in enumerate(reasons))
    return "\n".join([head, "|---" * (1 + len(TRAINING + LOADING)) + "|", *lines, "", notes + "."])


def test_page_shows_this_table():
    assert table() in (ROOT / "docs" / "checkpoints.md").read_text(), table()


def tails(state):
    """The projector's weights of a state dict, named from after `mm_projector.`."""
    return {name.split("mm_projector.")[1]: value for name, value in state.items() if "mm_projector." in name}


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def to_authors_format(folder, file):
    """Turn our checkpoint into what the authors' fork saves."""
    config = json.loads((folder / "config.json").read_text())
    edit_config(
        folder,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=[layer - 9 for layer in config["mm_fuser_layers"]],
        **{name: None for name in config if name.startswith("mm_fuser")},
    )

    def rename(name):
        head, mark, tail = name.partition("mm_projector.")
        return head + mark + (TO_AUTHORS.get(tail) or tail.replace("fuser.", "0.", 1)) if mark else name

    path = folder / file
    if path.suffix == ".bin":
        torch.save({rename(name): value for name, value in torch.load(path).items()}, path)
    else:
        save_file({rename(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


class Starts:
    """Makes each start once; `expected` is what its projector must hold, None for what starts afresh."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder

    def _made(self, name, make):
        return host.once(self.folder / name, make)

    def _adapter(self, kind):
        def make(output):
            options = dict(learning_rate=1e-2, max_steps=3)
            host.train(self.world, output, mm_projector_type=kind, **options)

        return self._made(f"llava-adapter-{kind}", make)

    def __getitem__(self, start):
        """Folder of a start; for Vicuna that of the language model."""
        if start == "Vicuna":
            return self.world / "llama"
        if start in ("our adapter", "MLP adapter"):
            return self._adapter("mmfuser" if start == "our adapter" else "mlp2x_gelu")
        if start == "authors' adapter":

            def make(output):
                shutil.copytree(self["our adapter"], output)
                to_authors_format(output, "mm_projector.bin")

            return self._made("llava-authors-adapter", make)
        kind = "mmfuser" if start == "authors' full" else "mlp2x_gelu"

        def make(output):
            options = dict(mm_projector_type=kind, lora_enable=start == "released LoRA", lora_r=4, max_steps=3)
            adapter = self._adapter(kind) / "mm_projector.bin"
            host.train(self.world, output, "finetune", pretrain_mm_mlp_adapter=adapter, learning_rate=1e-2, **options)
            if start != "released LoRA":  # in 16 bits, as they are released
                state = {name: value.bfloat16() for name, value in load_file(output / "model.safetensors").items()}
                save_file(state, output / "model.safetensors", metadata={"format": "pt"})
            if start == "authors' full":
                to_authors_format(output, "model.safetensors")

        return self._made("llava-" + start.replace("'", "").replace(" ", "-").lower(), make)

    def usable(self, start):
        """The start as it is used with a fuser: converted or upgraded where it must be."""
        command = {"authors": "convert", "release": "upgrade", "MLP ada": "upgrade"}.get(start[:7])
        if command is None:
            return self[start]
        source = self[start]

        def make(output):
            host.run([sys.executable, "-m", "llava_mmfuser", command, source, output])

        return self._made(source.name + "-usable", make)

    def base(self, start):
        """What a LoRA trained from a start needs as `model_base`."""
        return {"released full": self["released full"]}.get(start) or (
            self.usable(start) if start == "authors' full" else self.world / "llama"
        )

    def projector(self, start):
        """Weights that a run from this start must hold, under our names."""
        if start == "Vicuna":
            return {}
        folder = self[start]
        for file in ("mm_projector.bin", "non_lora_trainables.bin"):
            if (folder / file).exists():
                state = tails(torch.load(folder / file))
                break
        else:
            state = tails(load_file(folder / "model.safetensors"))
        if start.startswith("authors"):
            state = {FROM_AUTHORS.get(name) or name.replace("0.", "fuser.", 1): v for name, v in state.items()}
        return state


@pytest.fixture(scope="module")
def starts(world, tmp_path_factory):
    folder = host.shared(tmp_path_factory) / "routes"
    folder.mkdir(exist_ok=True)
    return Starts(world, folder)


@pytest.fixture(scope="module")
def trained(starts):
    """Trains from a start by a route, once."""

    def train(start, route):
        output = starts.folder / f"llava-lora-{start}-{route}".replace("'", "").replace(" ", "-").lower()
        return host.once(output, lambda output: make(output, start, route))

    def make(output, start, route):
        options = dict(learning_rate=0, max_steps=1)
        if start in ADAPTERS:
            options["pretrain_mm_mlp_adapter"] = starts[start] / "mm_projector.bin"
        else:
            options["model_name_or_path"] = starts.usable(start) if start == "authors' full" else starts[start]
        if "LoRA" in route:
            options.update(lora_enable=True, lora_r=4)
        stage = "pretrain" if route == "pretrain" else "finetune"
        if route.startswith("ZeRO"):
            done = host.deepspeed(starts.world, output, host.zero(starts.folder, int(route[-1])), stage, **options)
        elif route == "QLoRA":
            done = quantised_training(starts, output, **options)
        else:
            done = host.train(starts.world, output, stage, **options)
        source = {
            "our adapter": f"from {options.get('pretrain_mm_mlp_adapter')}",
            "authors' adapter": f"from {options.get('pretrain_mm_mlp_adapter')}",
            "authors' full": "from the checkpoint",
        }.get(start, "fresh, starts as identity")
        assert done.stdout.count(f"fuser weights: {source}") == 1, done.stdout[-3000:]

    return train


def quantised_training(starts, output, bits=4, **options):
    arguments = host.train_arguments(starts.world, output, "finetune", bits=bits, **options)
    return host.run([sys.executable, host.HERE / "quantised.py"] + arguments)


def saved(output):
    """The projector's weights that a run saved."""
    for file in ("mm_projector.bin", "non_lora_trainables.bin"):
        if (output / file).exists():
            return tails(torch.load(output / file))
    return tails(load_file(output / "model.safetensors"))


@pytest.mark.parametrize("start,route", cells(TRAINING))
def test_training_keeps_what_the_start_holds(starts, trained, start, route):
    output = trained(start, route)
    found, expected = saved(output), starts.projector(start)
    names = {"fuser." + name for name, _ in MMFuser(64).named_parameters()}
    names |= {f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert set(found) == names
    for name, value in found.items():
        assert value.isfinite().all(), name
        if name in expected:
            given = expected[name].bfloat16() if route == "QLoRA" else expected[name]  # before norms become float32
            assert torch.equal(value, given.to(value.dtype)), name
        elif "gate" in name:
            assert not value.any(), name
    config = json.loads((output / "config.json").read_text())
    assert config["mm_projector_type"] == "mmfuser" and config["mm_fuser_projector"] == "mlp2x_gelu"
    assert config["mm_fuser_layers"] in ([3, 4, 5, 6, 7], [-6, -5, -4, -3, -2])
    if route.endswith("LoRA"):
        lora = load_file(output / "adapter_model.safetensors")
        assert lora and not any("mm_projector" in name or "vision_tower" in name for name in lora)
    else:
        assert not (output / "adapter_config.json").exists()


def base_of(starts, start, route):
    """`model_base` for what `checkpoint` returns."""
    if route == "load base+adapter":
        return starts.world / "llama"
    if route in ("load LoRA", "merge"):
        return starts.base(start)
    return None


@pytest.fixture(scope="module")
def checkpoint(starts, trained):
    """Folder that a loading route reads: the start itself, or what training from it saved."""

    def find(start, route):
        if route in ("load LoRA", "merge"):
            return starts.usable(start) if start == "released LoRA" else trained(start, "LoRA")
        if route in ("load full", "load base+adapter"):
            return starts.usable(start)
        return starts.usable(start) if start == "released full" else merged(start)

    def merged(start):
        """A full checkpoint: merged, converted, or finetuned from the start."""
        if start == "released LoRA":
            return merge(starts, checkpoint_of(start, "merge"), starts.base(start))
        return starts.usable(start) if start == "authors' full" else trained(start, "finetune")

    checkpoint_of = find
    return find


def merge(starts, folder, base):
    """As upstream's scripts/merge_lora_weights.py, whose wheel lacks it."""

    def make(output):
        tokenizer, model, _, _ = load(folder, base)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)

    return host.once(starts.folder / f"{folder.name.replace('lora', 'merged')}", make)


def load(folder, base=None, **options):
    from llava.mm_utils import get_model_name_from_path

    name = get_model_name_from_path(str(folder))
    return load_pretrained_model(str(folder), base and str(base), name, device="cpu", **options)


@torch.inference_mode()
def logits(model):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 28, 28, dtype=torch.float16)
    ids = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])
    return model.eval()(ids, images=images).logits


@pytest.fixture
def fuser_log(caplog):
    import logging

    logging.getLogger("llava_mmfuser").addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == "llava_mmfuser")
    logging.getLogger("llava_mmfuser").removeHandler(caplog.handler)


@pytest.mark.parametrize("start,route", cells(("load full", "load base+adapter", "load LoRA", "merge")))
def test_loading_gives_what_was_saved(starts, checkpoint, fuser_log, start, route):
    folder, base = checkpoint(start, route), base_of(starts, start, route)
    tokenizer, model, _, _ = load(folder, base)
    if route == "merge":
        unmerged = logits(model)
        tokenizer, model, _, _ = load(merge(starts, folder, base))
        assert torch.equal(logits(model), unmerged)
    projector = model.get_model().mm_projector
    expected = starts.projector(start)
    for name, value in projector.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name].half()), name
        elif "gate" in name:
            assert not value.any(), name
    assert ("fuser weights: from" if route == "load full" else "loaded 24 of 24 fuser tensors") in fuser_log()
    if start in ("released full", "released LoRA"):
        _, plain, _, _ = load(starts[start], starts.world / "llama" if start == "released LoRA" else None)
        assert torch.equal(logits(model), logits(plain)), "the fuser starts as an identity"
    answer = model.generate(torch.tensor([[1, -200, 5, 6]]), images=torch.zeros(1, 3, 28, 28).half(), max_new_tokens=3)
    assert answer.numel() > 0 and logits(model).isfinite().all()


@pytest.mark.parametrize("start,route", cells(("8-bit", "4-bit")))
def test_quantised_loading_leaves_the_fuser_alone(starts, checkpoint, tmp_path, start, route):
    folder = checkpoint(start, route)
    code = """
import sys, torch, bitsandbytes as bnb
folder, bits, result, released, here = sys.argv[1:]
sys.path.insert(0, here)
import quantised
from llava.model.builder import load_pretrained_model
load = lambda folder: load_pretrained_model(folder, None, "llava", device="cpu", **{f"load_{bits}bit": True})[1].eval()
quant = load(folder)
kind = bnb.nn.Linear4bit if bits == "4" else bnb.nn.Linear8bitLt
projector = quant.get_model().mm_projector
assert type(projector._modules["0"]) is kind and type(projector._modules["2"]) is kind
assert not any(isinstance(module, (kind, torch.nn.Linear)) for module in projector.fuser.modules())
with torch.inference_mode():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 28, 28).half()
    features = quant.get_vision_tower()(images)
    ids = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])
    torch.save({"fused": projector.fuser(features.unflatten(-1, (5, 64)).unbind(-2)), "features": features,
                "logits": quant(ids, images=images).logits,
                "plain": load(released)(ids, images=images).logits if released else None,
                "fuser": projector.fuser.state_dict()}, result)
"""
    released = starts[start] if start == "released full" else ""
    host.run([sys.executable, "-c", code, folder, route[0], tmp_path / "quant.pt", released, host.HERE])
    quant = torch.load(tmp_path / "quant.pt")
    _, model, _, _ = load(folder)
    fuser = model.get_model().mm_projector.fuser
    for name, value in fuser.state_dict().items():
        assert torch.equal(quant["fuser"][name], value), name
    with torch.inference_mode():
        assert torch.equal(quant["fused"], fuser(quant["features"].unflatten(-1, (5, 64)).unbind(-2)))
    assert quant["logits"].isfinite().all()
    assert quant["plain"] is None or torch.equal(quant["logits"], quant["plain"]), "as without the fuser"


@pytest.mark.parametrize("route", ["finetune", "LoRA"])
@pytest.mark.fp16_cpu
def test_released_checkpoint_answers_bit_for_bit_as_before_at_learning_rate_0(starts, trained, route):
    released = starts["released full"]
    _, before, _, _ = load(released)
    _, after, _, _ = load(trained("released full", route), released if route == "LoRA" else None)
    assert hasattr(after.get_model().mm_projector, "fuser") and not hasattr(before.get_model().mm_projector, "fuser")
    assert torch.equal(logits(before), logits(after))


@pytest.mark.parametrize("start", ["authors' full", "authors' adapter"])
def test_authors_format_is_refused_with_the_command_that_converts_it(starts, start):
    folder = starts[start]
    command = f"python -m llava_mmfuser convert {folder} {folder}-llava-mmfuser"
    with pytest.raises(ValueError, match="format of the authors' MMFuser fork") as error:
        load(folder, starts.world / "llama" if "adapter" in start else None)
    assert command in str(error.value)
    if start == "authors' full":
        from llava.model import LlavaLlamaForCausalLM

        with pytest.raises(ValueError, match="format of the authors' MMFuser fork") as error:
            LlavaLlamaForCausalLM.from_pretrained(folder)
        assert command in str(error.value)
        done = host.train(starts.world, starts.folder / "refused", model_name_or_path=folder, check=False)
        assert done.returncode != 0 and command in done.stdout and not (starts.folder / "refused").exists()


@pytest.mark.bitsandbytes
def test_quantised_training_in_8_bits(starts, tmp_path):
    options = dict(lora_enable=True, lora_r=4, max_steps=2)
    quantised_training(starts, tmp_path / "llava-lora", bits=8, **options)
    found = saved(tmp_path / "llava-lora")
    assert len(found) == 28 and all(value.isfinite().all() for value in found.values())
    assert found["fuser.cross_gate.scale"].abs().max() > 0
    for name, value in found.items():  # train.py casts every module with norm in its name
        if name.startswith("fuser."):
            assert value.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
