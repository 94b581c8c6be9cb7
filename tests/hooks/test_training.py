"""One flag on upstream's unmodified scripts: train, save, reload, answer."""

import json
import sys

import host
import pytest
import torch
from tiny import SEEDED, answer, parse

from llava_mmfuser import MMFuser

FUSER_NAMES = {"model.mm_projector.fuser." + name for name, _ in MMFuser(64).named_parameters()}
MLP_NAMES = {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
FORKED = [sys.executable, host.HERE / "ranks.py", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def pretrained(world, folder):
    output = folder / "llava-pretrain"
    done = host.train(world, output)
    assert "fuser weights: fresh, starts as identity" in done.stdout
    return output


@pytest.fixture(scope="module")
def finetuned(world, folder, pretrained):
    output = folder / "llava-finetune"
    done = host.train(world, output, "finetune", pretrain_mm_mlp_adapter=pretrained / "mm_projector.bin")
    assert f"fuser weights: from {pretrained / 'mm_projector.bin'}" in done.stdout
    assert done.stdout.count("llava_mmfuser: INFO") == 1, "one line per event"
    return output


def adapter(output):
    return torch.load(output / "mm_projector.bin", map_location="cpu")


def test_pretraining_saves_every_fuser_and_mlp_weight(pretrained):
    state = adapter(pretrained)
    assert set(state) == FUSER_NAMES | MLP_NAMES
    assert all(value.isfinite().all() for value in state.values())
    assert state["model.mm_projector.fuser.cross_gate.scale"].abs().min() > 0, "the gates were trained"


def test_finetuning_saves_a_full_checkpoint_that_describes_itself(finetuned):
    config = json.loads((finetuned / "config.json").read_text())
    assert config["mm_projector_type"] == "mmfuser" and config["mm_fuser_layers"] == [3, 4, 5, 6, 7]
    assert config["mm_vision_select_layer"] == -2


@pytest.mark.fp16_cpu
def test_full_checkpoint_loads_and_answers(world, folder, finetuned):
    found, log = answer(world, finetuned, folder / "full.pt")
    assert f"fuser weights: from {finetuned}" in log
    assert found["answer"].numel() > 0 and found["logits"].isfinite().all()


@pytest.mark.fp16_cpu
def test_base_model_with_adapter_loads_and_answers(world, folder, pretrained):
    found, log = answer(world, pretrained, folder / "adapter.pt", world / "llama")
    for name, value in adapter(pretrained).items():
        assert torch.equal(found["projector"][name[len("model.mm_projector.") :]], value.half()), name
    assert "loaded 24 of 24 fuser tensors" in log
    assert found["answer"].numel() > 0 and found["logits"].isfinite().all()


# Trains with upstream's train(), and takes the logits of the trained model just before upstream saves it.
TRAIN_AND_RELOAD = """
import sys, torch
import llava.train.train as upstream
from llava.model import LlavaLlamaForCausalLM
output = sys.argv[sys.argv.index("--output_dir") + 1]

@torch.no_grad()
def logits(model):
    for part in (model.get_vision_tower(), model.get_model().mm_projector):
        part.to(torch.bfloat16)  # as the language model
    torch.manual_seed(0)
    return model.eval()(torch.tensor([[1, -200, 5, 6]]), images=torch.randn(1, 3, 28, 28).bfloat16()).logits

save = upstream.safe_save_model_for_hf_trainer
def save_then_measure(trainer, output_dir):
    save(trainer, output_dir)
    torch.save(logits(trainer.model), output + "/before.pt")
upstream.safe_save_model_for_hf_trainer = save_then_measure
upstream.train()

model = LlavaLlamaForCausalLM.from_pretrained(output, torch_dtype=torch.bfloat16)
model.get_vision_tower().load_model()
before, after = torch.load(output + "/before.pt"), logits(model)
assert torch.equal(before, after), (before - after).abs().max()
assert before.isfinite().all() and model.get_model().mm_projector.fuser.cross_gate.scale.abs().max() > 0
"""


def test_logits_after_reload_equal_those_before_saving(world, folder, pretrained):
    output = folder / "llava-reload"
    arguments = host.train_arguments(world, output, "finetune", pretrain_mm_mlp_adapter=pretrained / "mm_projector.bin")
    host.run([sys.executable, "-c", TRAIN_AND_RELOAD] + arguments)


def launch(world, output, kind, stage="pretrain", **options):
    """By torchrun for stage 1, and by DeepSpeed's launcher for what LLaVA's own scripts do with it; other ranks are
    forked."""
    if kind == "torchrun":
        options.update(ddp_backend="gloo")
        for check in (False, True):
            launcher = TORCHRUN + [host.free_port()] if stage == "pretrain" else FORKED
            done = host.train(world, output, stage, launcher=launcher, check=check, **options)
            if "terminate called without an active exception" not in done.stdout:  # gloo's threads, as a rank ends,
                break  # once in a while: nothing of ours or LLaVA's, so once more
        assert done.returncode == 0, done.stdout[-6000:]
        return done
    if (kind, stage) in (("ZeRO-2", "pretrain"), ("ZeRO-3", "finetune")):
        options.update(launcher=host.deepspeed_launcher())
    return host.deepspeed(world, output, host.zero(output.parent, int(kind[-1])), stage, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("torchrun", marks=pytest.mark.gloo_bf16),
        pytest.param("ZeRO-2", marks=pytest.mark.deepspeed_cpu),
        pytest.param("ZeRO-3", marks=pytest.mark.deepspeed_cpu),
    ],
)
def test_two_ranks_train_save_and_finetune(world, folder, kind):
    pretrain, finetune = folder / f"llava-{kind}-pretrain", folder / f"llava-{kind}-finetune"
    done = launch(world, pretrain, kind)
    assert done.stdout.count("fuser weights: fresh") == 1, "one line, from rank 0"
    state = adapter(pretrain)
    assert set(state) == FUSER_NAMES | MLP_NAMES
    assert state["model.mm_projector.fuser.cross_gate.scale"].float().abs().max() > 0
    launch(world, finetune, kind, "finetune", pretrain_mm_mlp_adapter=pretrain / "mm_projector.bin")
    history = json.loads((finetune / "trainer_state.json").read_text())["log_history"]
    gates = [entry["mm_fuser_cross_gate"] for entry in history if "loss" in entry]
    assert len(gates) == 2 and gates[0] != gates[1] and (finetune / "config.json").exists()
    code = f"""
import torch
from llava.model import LlavaLlamaForCausalLM
model = LlavaLlamaForCausalLM.from_pretrained({str(finetune)!r}, low_cpu_mem_usage=True, device_map={{"": "cpu"}})
assert all(parameter.isfinite().all() for parameter in model.parameters())
assert model.get_model().mm_projector.fuser.cross_gate.scale.abs().max() > 0
"""
    assert f"fuser weights: from {finetune}" in host.python(code).stdout


@pytest.mark.parametrize("kind", ["mlp2x_gelu", pytest.param("linear", marks=pytest.mark.matrix)])
def test_other_projector_types_train_bit_for_bit_as_without_the_package(world, tmp_path, kind):
    saved, launcher = [], [sys.executable, "-c", SEEDED]
    for switch in (None, "1"):
        env = host.environment(LLAVA_MMFUSER_DISABLE=switch)
        output = tmp_path / f"llava-{switch}"
        host.train(world, output / "pre", launcher=launcher, env=env, mm_projector_type=kind)
        host.train(
            world,
            output / "fine",
            "finetune",
            launcher=launcher,
            env=env,
            mm_projector_type=kind,
            pretrain_mm_mlp_adapter=output / "pre" / "mm_projector.bin",
        )
        code = f"""
import torch
from llava.model import LlavaLlamaForCausalLM
model = LlavaLlamaForCausalLM.from_pretrained({str(output / "fine")!r}, torch_dtype=torch.float32)
model.get_vision_tower().load_model()
torch.manual_seed(0)
logits = model(torch.tensor([[1, -200, 5, 6]]), images=torch.randn(1, 3, 28, 28)).logits
torch.save([logits.detach(), dict(model.named_parameters())], {str(output / "state.pt")!r})
"""
        host.python(code, env=env)
        config = json.loads((output / "fine" / "config.json").read_text())
        saved.append(
            (
                torch.load(output / "state.pt", weights_only=False),
                host.losses(output / "fine"),
                adapter(output / "pre"),
                {key: value for key, value in config.items() if key != "_name_or_path"},
            )
        )
    (with_logits, with_state), (without_logits, without_state) = saved[0][0], saved[1][0]
    assert torch.equal(with_logits, without_logits)
    assert with_state.keys() == without_state.keys()
    assert all(torch.equal(value, without_state[name]) for name, value in with_state.items())
    assert all(torch.equal(value, saved[1][2][name]) for name, value in saved[0][2].items())
    assert saved[0][1] == saved[1][1] and saved[0][3] == saved[1][3]


@pytest.mark.parametrize(
    "options,message",
    [
        (
            dict(mm_vision_select_layer="3,99"),
            "mm_vision_select_layer=3,99: layer 99 does not exist; this vision tower has 8 blocks",
        ),
        (dict(mm_vision_select_layer="7,3"), "mm_vision_select_layer=7,3 is not in order"),
        (dict(mm_fuser_layers="7"), "mm_fuser_layers=7 names 1 layer"),
        (dict(mm_fuser_layers="3,3,7"), "mm_fuser_layers=3,3,7 names a layer twice"),
        (dict(mm_fuser_num_heads="5"), "mm_fuser_num_heads=5 does not divide the feature width 64"),
        (dict(mm_fuser_num_points="0"), "mm_fuser_num_points=0"),
        (dict(mm_fuser_attention="sparse"), "mm_fuser_attention='sparse'"),
        (dict(mm_fuser_projector="mlp"), "mm_fuser_projector='mlp'"),
        (
            dict(mm_projector_type="mlp2x_gelu", mm_fuser_num_heads=4),
            "mm_fuser_num_heads was given, which needs mm_projector_type=mmfuser",
        ),
        (dict(mm_fuser_lr=-1), "mm_fuser_lr=-1.0 is not allowed; use a number of at least 0"),
        (dict(mm_fuser_lr="nan"), "mm_fuser_lr=nan is not allowed"),
        (
            dict(mm_projector_type="mlp2x_gelu", mm_fuser_lr=1e-4),
            "mm_fuser_lr was given, which needs mm_projector_type",
        ),
    ],
)
def test_wrong_flags_fail_in_upstreams_parser(world, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        parse(world, tmp_path / "out", model_name_or_path=tmp_path / "no-such-model", **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options,message", [(dict(mm_vision_select_layer="3;7"), "is not a list of layers"), (dict(mm_fuser_lr=-1), "-1.0")]
)
def test_train_py_ends_with_what_its_parser_refuses_before_any_weight_is_read(world, tmp_path, options, message):
    done = host.train(world, tmp_path / "out", check=False, model_name_or_path=tmp_path / "no-such-model", **options)
    assert done.returncode != 0 and message in done.stdout.splitlines()[-1], done.stdout[-2000:]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelling", ["=-6,-4,-2", "list-6/-4/-2", "3,5,7"])
def test_layers_on_the_command_line(world, tmp_path, spelling):
    arguments = host.train_arguments(world, tmp_path / "llava", mm_vision_select_layer=None, max_steps=1)
    flag = ["--mm_vision_select_layer" + spelling] if spelling[0] == "=" else ["--mm_vision_select_layer", spelling]
    host.run([sys.executable, host.train_py()] + arguments + flag)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["mm_fuser_layers"] == [3, 5, 7] and config["mm_vision_select_layer"] == 7


@pytest.mark.deepspeed_cpu
def test_fuser_initialises_and_trains_under_zero3(world):
    env = host.environment(
        DS_ACCELERATOR="cpu",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(host.free_port()),
    )
    host.run([sys.executable, host.HERE / "zero3_init.py", world], env=env)
