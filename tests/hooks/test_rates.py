"""What opens a fuser learns at a rate of its own, which the steps of the run decide where nobody does."""

import json
import logging
from types import SimpleNamespace

import host
import llava.train.train as upstream
import pytest
import torch
import transformers
from blocks import fused_projector

from llava_mmfuser import MMFuserConfig, MMFuserProjector
from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.hooks.optimizer import (
    INHERIT,
    MOST,
    REACH,
    deepspeed_init,
    full_steps,
    gate_means,
    opening,
    opening_rate,
    parse_rate,
    regroup,
    set_opening_rate,
)

STEPS, RATE = 1000, 1e-3


def projector(**settings):
    inner = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    return MMFuserProjector.build(MMFuserConfig(layers=(1, 2, 3), num_heads=4, **settings), 16, inner)


def optimizer_of(fused, gate_lr=None, lr=None):
    optimizer = torch.optim.AdamW(fused.parameters(), lr=RATE, weight_decay=0.1)
    regroup(optimizer, fused.fuser, lr, gate_lr)
    fused.lr, fused.gate_lr = lr, gate_lr
    return optimizer


def schedule(optimizer, kind="cosine", steps=STEPS):
    return transformers.get_scheduler(kind, optimizer, num_warmup_steps=30, num_training_steps=steps)


def rates(fused, optimizer, key="initial_lr"):
    """Name of a parameter of the fuser or of the MLP -> its rate."""
    held = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == len(list(fused.parameters()))
    return {name: held[id(parameter)] for name, parameter in fused.named_parameters()}


@pytest.mark.parametrize(
    "fusion,names",
    [
        ("mmfuser", ["cross_gate.scale", "self_gate.scale"]),
        ("weighted_sum", ["scale"]),
        ("channel_concat", ["extra.weight"]),
        ("dense_channel", ["extra.weight"]),
        ("mean", []),
        ("token_concat", []),
    ],
)
def test_what_opens_a_fusion(fusion, names):
    fuser = fused_projector(fusion).fuser if fusion != "mmfuser" else projector().fuser
    assert {id(p) for p in opening(fuser)} == {id(dict(fuser.named_parameters())[name]) for name in names}
    assert bool(names) == FUSIONS[fusion].starts_as_identity


@pytest.mark.parametrize("output,opens", [("add", {"cross_gate", "self_gate"}), ("columns", {"columns", "self_gate"})])
def test_gate_rate_is_for_what_opens_the_fuser_alone(output, opens):
    fused = projector(output=output)
    found = rates(fused, optimizer_of(fused, 0.5, 0.25), "lr")
    for name, rate in found.items():
        assert rate == (0.5 if name.split(".")[1] in opens else 0.25 if name.startswith("fuser.") else RATE), name
    assert set(gate_means(fused.fuser)) == {f"mm_fuser_{name}" for name in opens}
    decay = {id(p): group["weight_decay"] for group in optimizer_of(fused, 0.5).param_groups for p in group["params"]}
    assert decay[id(fused.fuser.self_gate.scale)] == 0
    assert output == "add" or decay[id(fused.fuser.columns.weight)] == 0.1, "a matrix decays as those of the MLP"


def test_inherit_groups_as_ever():
    for gate_lr, groups in ((INHERIT, 3), (None, 4)):  # MLP, decayed and undecayed of the fuser, and what opens it
        assert len(optimizer_of(projector(), gate_lr).param_groups) == groups


def test_gate_rate_for_a_fuser_that_is_not_trained_is_refused():
    fused = projector()
    optimizer = torch.optim.SGD(fused[0].parameters(), lr=1)
    regroup(optimizer, fused.fuser, None, None)
    with pytest.raises(ValueError, match="mm_fuser_gate_lr=0.1, but the fuser is not trained"):
        regroup(optimizer, fused.fuser, None, 0.1)


@pytest.mark.parametrize(
    "kind,part", [("cosine", 0.5), ("linear", 0.5), ("constant", 1), ("constant_with_warmup", 0.985)]
)
def test_full_steps_are_the_sum_of_the_schedule_in_use(kind, part):
    optimizer = optimizer_of(projector())
    scheduler = schedule(optimizer, kind)
    full, walked = full_steps(scheduler, STEPS), 0.0
    for _ in range(STEPS):
        walked += optimizer.param_groups[0]["lr"] / RATE
        optimizer.step()
        scheduler.step()
    assert full == pytest.approx(walked) and full == pytest.approx(part * STEPS, rel=0.02)


def test_schedule_that_is_not_known_beforehand_counts_every_step():
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer_of(projector()))
    assert full_steps(scheduler, STEPS) == STEPS


def test_adamw_moves_a_gate_as_far_as_the_bound_says():
    gate = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([gate], lr=RATE, weight_decay=0.0)
    scheduler = schedule(optimizer)
    for _ in range(STEPS):
        gate.grad = torch.ones(1)  # always the same way
        optimizer.step()
        scheduler.step()
    assert -gate.item() == pytest.approx(RATE * full_steps(scheduler, STEPS), rel=0.01)


def test_opening_rate_is_that_of_the_rest_where_this_can_open_the_fuser():
    assert opening_rate(1e-3, 10 * REACH / 1e-3) == 1e-3
    assert opening_rate(1e-5, 500) == pytest.approx(REACH / 500)
    assert opening_rate(1e-5, 3) == MOST and opening_rate(2 * MOST, 3) == 2 * MOST


@pytest.fixture
def said(caplog):
    logger = logging.getLogger("llava_mmfuser")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("output", ["add", "columns"])
def test_fresh_identity_gets_a_rate_that_opens_it_within_the_run(said, output):
    fused = projector(output=output)
    optimizer = optimizer_of(fused)
    scheduler = schedule(optimizer)
    set_opening_rate(scheduler, fused, STEPS)
    found = rates(fused, optimizer)
    opened = REACH / full_steps(scheduler, STEPS)
    ids = {id(p) for p in opening(fused.fuser)}
    for name, parameter in fused.named_parameters():
        assert found[name] == pytest.approx(opened if id(parameter) in ids else RATE), name
    assert f"what opens the fuser learns at {opened:.1e}, the rest of it at 1.0e-03; --mm_fuser_gate_lr" in said.text
    for _ in range(STEPS // 2):
        optimizer.step()
        scheduler.step()
    held = rates(fused, optimizer, "lr")
    gate = "fuser.columns.weight" if output == "columns" else "fuser.cross_gate.scale"
    assert held[gate] / held["0.weight"] == pytest.approx(opened / RATE), "the schedule is for both"


@pytest.mark.parametrize(
    "prepare,flags",
    [
        (lambda fused: fused.fuser.cross_gate.scale.data.fill_(0.5), {}),
        (lambda fused: None, dict(lr=0.1)),
        (lambda fused: None, dict(gate_lr=0.1)),
    ],
    ids=["trained", "mm_fuser_lr", "mm_fuser_gate_lr"],
)
def test_rates_stay_where_the_fuser_is_awake_or_somebody_chose(said, prepare, flags):
    fused = projector()
    prepare(fused)
    optimizer = optimizer_of(fused, **{"gate_lr": INHERIT if "lr" in flags else None, **flags})
    before = rates(fused, optimizer, "lr")
    scheduler = schedule(optimizer)
    set_opening_rate(scheduler, fused, STEPS)
    assert rates(fused, optimizer) == before and not said.text


@pytest.mark.parametrize("size,gate_lr,warned", [(0, INHERIT, True), (0.005, INHERIT, True), (0.02, INHERIT, False)])
def test_fuser_that_stays_shut_is_pointed_out_before_the_run(said, size, gate_lr, warned):
    fused = projector()
    fused.fuser.cross_gate.scale.data.fill_(size)
    optimizer = optimizer_of(fused, gate_lr, lr=1e-4)
    scheduler = schedule(optimizer)
    set_opening_rate(scheduler, fused, STEPS)
    text = "a rate of 1.0e-04 moves what opens it by 0.05 at most in the 1000 steps of this run"
    assert (text in said.text) == warned
    assert (f"recommended is --mm_fuser_gate_lr {REACH / full_steps(scheduler, STEPS):.0e}" in said.text) == warned


@pytest.mark.parametrize("flags", [{}, dict(mm_fuser_output="columns")], ids=["add", "columns"])
def test_upstreams_trainer_takes_the_rate_and_the_start_says_so(world, tmp_path, flags):
    done = host.train(world, tmp_path / "llava-pretrain", max_steps=20, logging_steps=1, **flags)
    assert f"what opens the fuser learns at {MOST:.1e}, the rest of it at 1.0e-03; --mm_fuser_gate_lr" in done.stdout
    history = json.loads((tmp_path / "llava-pretrain" / "trainer_state.json").read_text())["log_history"]
    name = f"mm_fuser_{'columns' if flags else 'cross_gate'}"
    sizes = [entry[name] for entry in history if "loss" in entry]
    assert sizes[0] < 0.03 and sizes[-1] > 0.04, "at the rest's rate it would stay below 0.02"


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(mm_fuser_gate_lr="fast"), "mm_fuser_gate_lr=fast is not allowed; use a number of at least 0"),
        (dict(mm_fuser_gate_lr="1e-2", mm_fuser_fusion="mean"), "mm_fuser_gate_lr=1e-2 has no effect with .*=mean"),
        (dict(mm_fuser_gate_lr="inherit", mm_projector_type="mlp2x_gelu"), "mm_fuser_gate_lr was given, which needs"),
    ],
)
def test_rate_that_cannot_be_is_refused_before_a_weight_is_read(world, tmp_path, options, message):
    arguments = host.train_arguments(world, tmp_path / "llava", **options)
    with pytest.raises(ValueError, match=message):
        transformers.HfArgumentParser(
            (upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments)
        ).parse_args_into_dataclasses([str(part) for part in arguments])


@pytest.mark.parametrize("flag,saved", [("5e-2", 0.05), ("inherit", "inherit")])
def test_flag_reaches_the_trainer_and_config_json(world, tmp_path, flag, saved):
    folder = tmp_path / "llava-pretrain"
    done = host.train(world, folder, max_steps=10, logging_steps=1, mm_fuser_gate_lr=flag)
    assert "what opens the fuser learns at" not in done.stdout
    assert json.loads((folder / "config.json").read_text())["mm_fuser_gate_lr"] == saved
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    size = [entry["mm_fuser_cross_gate"] for entry in history if "loss" in entry][-1]
    assert size > 0.06 if flag == "5e-2" else size <= 0.01, "ten steps of 1e-3"


def test_flag_is_a_number_or_inherit():
    assert [parse_rate("mm_fuser_gate_lr", text) for text in (None, "inherit", "4e-2", "0")] == [
        None,
        INHERIT,
        0.04,
        0.0,
    ]
    for text in ("fast", "-1", "inf", "nan", ""):
        with pytest.raises(ValueError, match=f"mm_fuser_gate_lr={text} is not allowed; use a number .* or inherit"):
            parse_rate("mm_fuser_gate_lr", text)


@pytest.mark.parametrize("gate_lr", [0.1, INHERIT, None])
def test_gate_rate_where_deepspeed_has_its_own_optimizer_is_refused(gate_lr):
    model = torch.nn.Module()
    model.mm_projector = projector()
    model.mm_projector.gate_lr = gate_lr
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"optimizer": {}}))
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    if gate_lr != 0.1:
        assert deepspeed_init(lambda *args: args, trainer, 5) == (trainer, 5)
        return
    with pytest.raises(ValueError, match="mm_fuser_gate_lr=0.1, but the DeepSpeed configuration has .* optimizer"):
        deepspeed_init(lambda *args: args, trainer, 5)


def test_fuser_that_is_not_trained_is_left_alone():
    fused = projector()
    optimizer = torch.optim.SGD(fused[0].parameters(), lr=1)
    scheduler = schedule(optimizer)
    set_opening_rate(scheduler, fused, STEPS)
    assert scheduler.base_lrs == [1]
