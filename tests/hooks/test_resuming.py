"""What training adds: the fuser's own learning rate, its gates in the logs, and resuming after SIGKILL."""

import json
import os
import sys
import time

import host
import pytest
import torch

from llava_mmfuser import MMFuser
from llava_mmfuser.hooks.optimizer import gate_means, regroup
from llava_mmfuser.hooks.resuming import load_trainables, save_trainables


class Model(torch.nn.Module):
    """A fuser beside something else, grouped as upstream groups them: decay, no decay, and both for the projector."""

    def __init__(self):
        super().__init__()
        self.fuser, self.other = MMFuser(32, num_layers=3), torch.nn.Linear(4, 4)

    def optimizer(self, weight_decay=0.1):
        def group(named, **settings):
            return [
                {"params": [p for n, p in named if "bias" not in n], "weight_decay": weight_decay, **settings},
                {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0, **settings},
            ]

        fuser, other = list(self.fuser.named_parameters()), list(self.other.named_parameters())
        return torch.optim.AdamW(group(other) + group(fuser, lr=2e-3), lr=1e-3)


@pytest.mark.parametrize("lr", [None, 1e-4, 0.0])
def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay(lr):
    model = Model()
    optimizer = model.optimizer()
    regroup(optimizer, model.fuser, lr)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["params"]
        for name in (names[id(parameter)] for parameter in group["params"]):
            fuser = name.startswith("fuser.")
            assert group["lr"] == (1e-3 if not fuser else 2e-3 if lr is None else lr), name
            free = "bias" in name or (fuser and ("norm" in name or "gate" in name))
            assert group["weight_decay"] == (0.0 if free else 0.1), name
            assert group["betas"] == (0.9, 0.999)


def test_rate_for_a_fuser_that_is_not_trained_is_refused():
    model = Model()
    optimizer = torch.optim.SGD(model.other.parameters(), lr=1)
    regroup(optimizer, model.fuser, None)
    with pytest.raises(ValueError, match="mm_fuser_lr=0.1, but the fuser is not trained"):
        regroup(optimizer, model.fuser, 0.1)


def test_gate_means():
    fuser = MMFuser(32, num_layers=3)
    assert gate_means(fuser) == {"mm_fuser_cross_gate": 0.0, "mm_fuser_self_gate": 0.0}
    with torch.no_grad():
        fuser.cross_gate.scale[:16] = -0.5
    assert gate_means(fuser)["mm_fuser_cross_gate"] == 0.25
    assert set(gate_means(MMFuser(32, self_attention=False))) == {"mm_fuser_cross_gate"}


def test_trainables_come_back_and_others_are_refused(tmp_path):
    source, target = Model(), Model()
    for model in (source, target):
        model.other.requires_grad_(False)
    save_trainables(source, str(tmp_path / "step" / "weights.bin"), write=True)
    assert os.listdir(tmp_path / "step") == ["weights.bin"]
    assert not any("other" in name for name in torch.load(tmp_path / "step" / "weights.bin"))
    load_trainables(target, str(tmp_path / "step" / "weights.bin"))
    for (name, value), expected in zip(target.fuser.named_parameters(), source.fuser.parameters()):
        assert torch.equal(value, expected), name
    target.other.requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not belong to this run: missing other.weight, other.bias; resume"):
        load_trainables(target, str(tmp_path / "step" / "weights.bin"))
    target.other.requires_grad_(False)
    torch.save(
        {**torch.load(tmp_path / "step" / "weights.bin"), "fuser.query_norm.bias": torch.zeros(1)}, tmp_path / "b"
    )
    with pytest.raises(ValueError, match=r"fuser.query_norm.bias is \[1\] instead of \[32\]"):
        load_trainables(target, str(tmp_path / "b"))
    with pytest.raises(ValueError, match="no such file"):
        load_trainables(target, str(tmp_path / "step" / "other.bin"))
    save_trainables(source, str(tmp_path / "nothing" / "weights.bin"), write=False)
    assert not (tmp_path / "nothing").exists()


# Runs upstream's train() and prints the optimizer's groups: rate, decay, names.
GROUPS = """
import json, sys
import llava.train.train as upstream
from llava.train.llava_trainer import LLaVATrainer
create = LLaVATrainer.create_optimizer
def create_and_print(self):
    optimizer = create(self)
    names = {id(p): n for n, p in self.model.named_parameters()}
    print("GROUPS", json.dumps([[g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]]
                                for g in optimizer.param_groups]))
    print("TRAINED", json.dumps([n for n, p in self.model.named_parameters() if p.requires_grad]))
    return optimizer
LLaVATrainer.create_optimizer = create_and_print
upstream.train()
"""


@pytest.mark.parametrize(
    "stage,options,rates",
    [
        ("pretrain", dict(mm_fuser_lr=1e-4), {"fuser": 1e-4, "mlp": 1e-3}),
        ("finetune", dict(mm_projector_lr=3e-4, mm_fuser_lr=1e-5), {"fuser": 1e-5, "mlp": 3e-4, "llm": 2e-4}),
        pytest.param(
            *("finetune", dict(mm_fuser_lr=1e-5), {"fuser": 1e-5, "mlp": 2e-4, "llm": 2e-4}), marks=pytest.mark.matrix
        ),
        pytest.param(
            *("finetune", dict(mm_projector_lr=3e-4), {"fuser": 3e-4, "mlp": 3e-4, "llm": 2e-4}),
            marks=pytest.mark.matrix,
        ),
        ("finetune", dict(lora_enable=True, mm_fuser_lr=1e-5), {"fuser": 1e-5, "mlp": 2e-4, "llm": 2e-4}),
    ],
    ids=["pretrain", "both rates", "fuser alone", "projector alone", "lora"],
)
def test_rates_in_upstreams_trainer(world, tmp_path, stage, options, rates):
    arguments = host.train_arguments(
        world, tmp_path / "llava-lora", stage, weight_decay=0.1, max_steps=1, lr_scheduler_type="constant", **options
    )
    lines = host.run([sys.executable, "-c", GROUPS] + arguments).stdout.splitlines()
    groups, trained = (
        json.loads(next(line for line in lines if line.startswith(word)).split(" ", 1)[1])
        for word in ("GROUPS", "TRAINED")
    )
    assert sorted(name for group in groups for name in group[2]) == sorted(trained)
    for lr, decay, names in groups:
        assert names
        for name in names:
            kind = "fuser" if ".fuser." in name else "mlp" if "mm_projector" in name else "llm"
            assert lr == rates[kind], name
            if kind == "fuser":
                assert decay == (0.0 if any(word in name for word in ("norm", "gate", "bias")) else 0.1), name
    config = json.loads((tmp_path / "llava-lora" / "config.json").read_text())
    assert config["mm_fuser_lr"] == options.get("mm_fuser_lr")


@pytest.mark.parametrize("on", [True, False])
def test_gates_are_logged_beside_the_loss(world, tmp_path, on):
    host.train(world, tmp_path, mm_fuser_log_gates=None if on else False)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    if not on:
        assert not any("mm_fuser" in key for entry in history for key in entry)
        return
    gates = [entry["mm_fuser_cross_gate"] for entry in logged]
    assert len(gates) == len(logged) and gates[0] < gates[1] < gates[-1], "the fuser wakes up"
    assert logged[-1]["mm_fuser_self_gate"] > 0 and not any(
        "mm_fuser_cross_gate" in e for e in history if "loss" not in e
    )


@pytest.mark.deepspeed_cpu
@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_rate_that_deepspeed_would_ignore_is_refused(world, tmp_path, section):
    configuration = host.zero(tmp_path, 2)
    settings = json.loads(configuration.read_text())
    settings["zero_allow_untested_optimizer"] = True
    settings[section] = {"type": {"optimizer": "AdamW", "scheduler": "WarmupLR"}[section], "params": {}}
    configuration.write_text(json.dumps(settings))
    command, env = host.deepspeed_command(world, tmp_path / "out", configuration, mm_fuser_lr=1e-4)
    done = host.run(command, env=env, check=False)
    assert (
        done.returncode
        and f"mm_fuser_lr=0.0001, but the DeepSpeed configuration has the section {section}" in done.stdout
    )


def test_changed_settings_are_noticed_on_resuming(world, tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    host.train(world, tmp_path / "llava", mm_vision_select_layer="3,5,7", **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = host.train(world, tmp_path / "llava", mm_vision_select_layer="2,4,7", check=False, **options)
    assert done.returncode and "was trained with mm_fuser_layers=3,5,7, but this run has 2,4,7" in done.stdout
    (tmp_path / "llava" / "checkpoint-4" / "trainer_state.json").unlink()  # as upstream saves stage 1
    done = host.train(world, tmp_path / "llava", mm_vision_select_layer="3,5,7", check=False, **options)
    assert done.returncode and "checkpoint-4 holds an adapter only and cannot be resumed" in done.stdout
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())


def test_fsdp_is_refused(world, tmp_path):
    done = host.train(world, tmp_path / "llava", check=False, fsdp="full_shard auto_wrap")
    assert done.returncode and "together with mm_projector_type=mmfuser is not supported" in done.stdout


def resumable(output):
    """Steps of the checkpoints in a run's folder."""
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*") if path.is_dir())


# torch 2.6 and later read the Trainer's random states only with this; transformers 4.37 predates that default.
TRUSTED = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
# Upstream draws the projector's initial weights unseeded.
SEEDED = """
import runpy, sys, torch
torch.manual_seed(0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_after(step, output, command, env):
    """Start a run and SIGKILL all of its processes once the checkpoint of a step is complete."""
    with open(output.with_suffix(".log"), "w") as log:
        process = host.start(command, log, env)
        deadline = time.time() + 300
        while step not in resumable(output) and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        host.stop(process)
    assert not (output / "trainer_state.json").exists(), "killed in the middle of the epoch"


def zero(kind, stage):
    return pytest.param(kind, stage, marks=pytest.mark.deepspeed_cpu, id=f"{kind} ZeRO-{stage}")


@pytest.mark.slow
@pytest.mark.parametrize(  # under DeepSpeed as LLaVA's scripts use it
    "kind,level",
    [
        pytest.param("full", None, marks=pytest.mark.matrix),
        ("lora", None),
        ("stage 1", None),
        zero("full", 3),
        zero("lora", 3),
        zero("stage 1", 2),
    ],
)
def test_run_that_was_killed_resumes_with_the_same_losses(world, tmp_path, kind, level):
    stage = "pretrain" if kind == "stage 1" else "finetune"
    options = dict(save_strategy="steps", save_steps=2, num_train_epochs=3, per_device_train_batch_size=2)
    options.update(lora_enable=True, lora_r=4) if kind == "lora" else None

    def command(output):
        if level:
            command, env = host.deepspeed_command(world, output, host.zero(tmp_path, level), stage, **options)
            return command, {**env, **TRUSTED}
        arguments = host.train_arguments(world, output, stage, **options)
        return [sys.executable, "-c", SEEDED, host.train_py()] + arguments, host.environment(**TRUSTED)

    whole, killed = tmp_path / "llava-lora-whole", tmp_path / "llava-lora-killed"
    launch, env = command(whole)
    host.run(launch, env=env)
    kill_after(4, killed, *command(killed))
    step = resumable(killed)[-1]
    launch, env = command(killed)
    done = host.run(launch, env=env)
    expected = host.losses(whole)
    assert len(expected) > step + 2 and host.losses(killed) == expected, (step, done.stdout[-1500:])
    if kind == "stage 1" and level:
        (file,) = (killed / f"checkpoint-{step}").glob("global_step*/mp_rank_00_model_states.pt")
        names = list(torch.load(file, weights_only=False)["module"])
        assert names and all("mm_projector" in name for name in names), "frozen weights are left out"
    if kind == "stage 1":
        states = [torch.load(folder / "mm_projector.bin") for folder in (whole, killed)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.fp16_cpu
def test_lora_checkpoint_in_the_middle_of_a_run_loads_by_itself(world, tmp_path):
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    options = dict(lora_enable=True, lora_r=4, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    host.train(world, tmp_path / "llava-lora", "finetune", **options)
    folder = tmp_path / "llava-lora" / "checkpoint-2"
    name = get_model_name_from_path(str(folder))
    model = load_pretrained_model(str(folder), str(world / "llama"), name, device="cpu")[1]
    saved = torch.load(folder / "non_lora_trainables.bin")
    for name, value in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, saved[f"base_model.model.model.mm_projector.{name}"].half()), name
    assert model.get_model().mm_projector.fuser.cross_gate.scale.abs().max() > 0
