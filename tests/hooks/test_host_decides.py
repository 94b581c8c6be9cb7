"""The host's own code decides: its towers, arguments and Trainers, forks of it, and programs that are not LLaVA's."""

import copy
import dataclasses
import io
import json
import pickle
import shutil
import sys
from typing import Optional

import host
import llava.train.train as upstream
import pytest
import torch
import transformers
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train.llava_trainer import LLaVATrainer
from test_run import TINY, initialized, parsed, plain, same, state, trainer
from tiny import IMAGES, arguments, model_with

from llava_mmfuser.hooks import optimizer as ours
from llava_mmfuser.hooks import wrappers
from llava_mmfuser.hooks.wrappers import find_projector

LAYERS = (0, 3, 7)


class Pooling(CLIPVisionTower):
    """Half as many tokens a side, and half as large: 4 x 4 to 2 x 2."""

    def feature_select(self, image_forward_outs):
        self.selected = getattr(self, "selected", 0) + 1
        maps = super().feature_select(image_forward_outs)
        grid = maps.transpose(1, 2).unflatten(2, (4, 4))
        return torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2) * 0.5


class Attentive(CLIPVisionTower):
    """Weighs the tokens by what the last block's CLS looks at."""

    @torch.no_grad()
    def forward(self, images):
        outs = self.vision_tower(images, output_hidden_states=True, output_attentions=True)
        seen = outs.attentions[-1][:, :, 0, 1:].mean(1)
        return self.feature_select(outs) * seen.unsqueeze(-1)


def made(kind, world, **settings):
    return kind(str(world / "clip"), arguments(world, **{"mm_fuser_layers": LAYERS, **settings})).eval()


def one_layer(kind, world, layer):
    return kind(
        str(world / "clip"), arguments(world, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=layer)
    ).eval()


@pytest.mark.parametrize("kind", [Pooling, Attentive])
def test_what_a_tower_does_to_its_map_it_does_to_every_fused_one(world, kind):
    tower = made(kind, world)
    found = tower(IMAGES)
    expected = torch.cat([one_layer(kind, world, layer)(IMAGES) for layer in LAYERS], -1)
    assert torch.equal(found, expected)
    assert kind is Attentive or tower.selected == len(LAYERS)
    assert kind is Attentive or found.shape == (3, 4, 3 * 64)


def test_pooled_maps_train_through_the_whole_model(world, monkeypatch):
    import llava.model.multimodal_encoder.builder as builder

    monkeypatch.setattr(builder, "CLIPVisionTower", Pooling)
    model = model_with(world)
    assert isinstance(model.get_vision_tower(), Pooling) and model.encode_images(IMAGES).shape == (3, 4, 64)


def test_the_vit_runs_once_and_its_hooks_see_what_they_see_without_a_fuser(world):
    seen = []
    for tower in (made(CLIPVisionTower, world), one_layer(CLIPVisionTower, world, -2)):
        vision = tower.vision_tower.vision_model
        for module in (tower.vision_tower, vision, vision.encoder, vision.embeddings):
            module.register_forward_hook(lambda module, _, output: seen.append((type(module).__name__, output)))
        tower(IMAGES)
    fused, alone = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [name for name, _ in fused] == [name for name, _ in alone]
    for (_, output), (_, expected) in zip(fused[1:], alone[1:]):
        for key in expected:
            assert len(output[key]) == len(expected[key])
            assert all(torch.equal(a, b) for a, b in zip(output[key], expected[key])), key


def test_only_the_fused_maps_are_kept_where_nobody_asks_for_more(world, monkeypatch):
    tower, asked = made(CLIPVisionTower, world), []
    forward = type(tower.vision_tower).forward
    monkeypatch.setattr(
        type(tower.vision_tower), "forward", lambda self, *args, **kw: asked.append(kw) or forward(self, *args, **kw)
    )
    found = tower(IMAGES)
    assert asked == [{"output_hidden_states": False}]
    assert found.untyped_storage().nbytes() == 3 * 17 * len(LAYERS) * 64 * 4, "one tensor, of which this is a view"
    assert len(list(tower.vision_tower.vision_model.encoder.layers)) == 8, "elsewhere all blocks are there"


@pytest.mark.parametrize("attribute", ["last_hidden_state", "pooler_output", "hidden_states"])
def test_a_tower_that_reads_what_is_not_computed_is_refused_by_name(world, attribute):
    class Other(CLIPVisionTower):
        def forward(self, images):
            found = getattr(self.vision_tower(images, output_hidden_states=True), attribute)
            return found[-2][:, 1:] if attribute == "hidden_states" else found[:, 1:]

    with pytest.raises(AttributeError, match=f"Other reads {attribute}.* of its ViT, which mm_projector_type=mmfuser"):
        made(Other, world, mm_fuser_layers="1,3,7")(IMAGES)


def test_a_tower_that_does_not_call_its_vit_is_refused_by_name(world):
    class Direct(CLIPVisionTower):
        def forward(self, images):
            return self.vision_tower.vision_model(images).last_hidden_state[:, 1:]

    with pytest.raises(ValueError, match=r"Direct.forward does not call self.vision_tower\(…\)"):
        made(Direct, world)(IMAGES)


def test_a_tower_that_returns_no_maps_is_refused_by_name(world):
    class Pair(CLIPVisionTower):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(ValueError, match="Pair.forward returns tuple, tuple, tuple for the fused layers"):
        made(Pair, world)(IMAGES)


# Arguments


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "mmfuser"])
def test_model_arguments_stay_the_hosts(world, tmp_path, kind):
    model_args = parsed(world, tmp_path, "--mm_projector_type", kind)[0]
    assert type(model_args) is upstream.ModelArguments
    names = {field.name for field in dataclasses.fields(upstream.ModelArguments)}
    assert vars(model_args).keys() == names
    again = upstream.ModelArguments(**vars(model_args))
    assert again == model_args == pickle.loads(pickle.dumps(model_args)) == copy.deepcopy(model_args)
    torch.save(model_args, io.BytesIO())
    assert json.loads(json.dumps(vars(model_args))) == vars(model_args)


def test_flags_that_were_given_stay_with_the_arguments(world, tmp_path):
    flags = ("--mm_fuser_num_points", 2, "--mm_fuser_layers", "1,4,7")
    model_args = pickle.loads(pickle.dumps(parsed(world, tmp_path, *flags)[0]))
    assert (model_args.mm_fuser_num_points, json.loads(json.dumps(vars(model_args)))["mm_fuser_layers"]) == (2, "1,4,7")
    model = LlavaLlamaForCausalLM(LlavaConfig(**TINY))
    model.get_model().initialize_vision_modules(model_args)
    assert model.config.mm_fuser_num_points == 2 and model.config.mm_fuser_layers == [1, 4, 7]


def test_arguments_that_are_changed_after_parsing_count(world, tmp_path):
    first = initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world)
    with torch.no_grad():
        find_projector(first).fuser.cross_gate.scale.fill_(0.5)
    adapter = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{name}": value for name, value in state(first).items()}, adapter)
    second = initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world, pretrain_mm_mlp_adapter=str(adapter))
    assert same(state(second), state(first))
    third = initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world, mm_vision_select_layer=[1, 4])
    assert third.config.mm_fuser_layers == [1, 4] and third.get_vision_tower().select_layer == [1, 4]
    with pytest.raises(ValueError, match="pretrain_mm_mlp_adapter=.*none.bin: no such file"):
        initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world, pretrain_mm_mlp_adapter="none.bin")


def test_another_checkpoint_after_parsing_keeps_the_layers_that_it_was_trained_with(world, tmp_path):
    trained = initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world, "--mm_fuser_layers", "2,5,7")
    trained.save_pretrained(tmp_path / "llava", safe_serialization=True)
    model_args = parsed(world, tmp_path / "out")[0]
    model_args.model_name_or_path = str(tmp_path / "llava")
    model = LlavaLlamaForCausalLM.from_pretrained(model_args.model_name_or_path)
    model.get_model().initialize_vision_modules(model_args)
    assert model.config.mm_fuser_layers == [2, 5, 7] == model.get_vision_tower().select_layer


def settings_for(world, output, **settings):
    values = dict(
        model_name_or_path=str(world / "llama"),
        vision_tower=str(world / "clip"),
        mm_projector_type="mmfuser",
        mm_vision_select_layer=-2,
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
    )
    return {**values, **settings}


def by_json(parser, given, folder):
    (folder / "run.json").write_text(json.dumps(given))
    return parser.parse_json_file(str(folder / "run.json"))


def by_yaml(parser, given, folder):
    (folder / "run.yaml").write_text(json.dumps(given))
    return parser.parse_yaml_file(str(folder / "run.yaml"))


def test_a_rate_that_yaml_reads_as_a_text_is_a_number(world, tmp_path):
    parser = transformers.HfArgumentParser((upstream.ModelArguments, upstream.TrainingArguments))
    lines = [f"{name}: {value}" for name, value in settings_for(world, tmp_path, mm_fuser_lr="1e-4").items()]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    model_args, _ = parser.parse_yaml_file(str(tmp_path / "run.yaml"))
    assert model_args.mm_fuser_lr == "1e-4", "else this shows nothing"
    model = LlavaLlamaForCausalLM(LlavaConfig(**TINY))
    model.get_model().initialize_vision_modules(model_args)
    assert find_projector(model).lr == model.config.mm_fuser_lr == 1e-4


def by_hand(parser, given, folder):
    parts = []
    for kind in parser.dataclass_types:
        names = {field.name for field in dataclasses.fields(kind)}
        parts.append(kind(**{name: value for name, value in given.items() if name in names}))
    for name in ("mm_fuser_num_points",):
        if name in given:
            setattr(parts[0], name, given[name])
    return parts


WAYS = [by_json, by_yaml, lambda parser, given, folder: parser.parse_dict(given), by_hand]


@pytest.mark.parametrize("way", WAYS, ids=["JSON", "YAML", "dict", "by hand"])
def test_every_way_to_arguments_has_the_seed_and_the_checks(world, tmp_path, way):
    classes = upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments
    parser = transformers.HfArgumentParser(classes)

    def fuser(disturbance, **settings):
        torch.manual_seed(disturbance)
        parts = way(parser, settings_for(world, tmp_path, **settings), tmp_path)
        assert [type(part) for part in parts] == list(classes)
        model = LlavaLlamaForCausalLM(LlavaConfig(**TINY))
        model.get_model().initialize_vision_modules(parts[0])
        return {name: value for name, value in state(model).items() if name.startswith("fuser.")}

    assert same(fuser(1, seed=3), fuser(2, seed=3)) and not same(fuser(1, seed=3), fuser(1, seed=4))
    shapes = [
        {name: value.shape for name, value in fuser(1, **few).items()} for few in ({}, {"mm_fuser_num_points": 2})
    ]
    assert shapes[0] != shapes[1]
    for wrong, message in (
        (dict(mm_vision_select_layer=[3, 99]), "layer 99 does not exist"),
        (dict(mm_fuser_num_points=0), "mm_fuser_num_points=0"),
    ):
        with pytest.raises(ValueError, match=message):
            fuser(1, **wrong)
    if way is not by_hand:
        with pytest.raises(ValueError, match="mm_fuser_num_points was given, which needs mm_projector_type=mmfuser"):
            parser.parse_dict(
                {**settings_for(world, tmp_path), "mm_projector_type": "linear", "mm_fuser_num_points": 2}
            )


def test_parsers_of_other_programs_are_left_alone(world, tmp_path):
    @dataclasses.dataclass
    class Other:
        mm_projector_type: str = "mlp2x_gelu"
        image_tower: Optional[str] = None

    parser = transformers.HfArgumentParser((Other, transformers.TrainingArguments))
    assert not any("mm_fuser" in option for option in parser._option_string_actions)
    fused = model_with(world)
    (tmp_path / "checkpoint-1").mkdir()
    fused.config.save_pretrained(tmp_path / "checkpoint-1")
    found, training = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "True"])
    assert type(found) is Other and training.output_dir == str(tmp_path)

    @dataclasses.dataclass
    class Own(upstream.ModelArguments):
        pass

    parser = transformers.HfArgumentParser((Own, transformers.TrainingArguments))
    flags = ["--vision_tower", str(world / "clip"), "--mm_projector_type", "mmfuser", "--use_cpu", "True"]
    flags += ["--mm_vision_select_layer", "-2", "--output_dir", str(tmp_path)]
    assert parser.parse_args_into_dataclasses(flags)[1].output_dir == str(tmp_path), "it has no lora_enable"


# Trainers


class Holder(torch.nn.Module):
    """A module of somebody's own around a LLaVA, without a config."""

    def __init__(self, llava):
        super().__init__()
        self.llava = llava

    def forward(self, **inputs):
        return self.llava(**inputs)


def test_a_llava_inside_a_module_without_config_trains_saves_and_resumes(world, tmp_path):
    model = Holder(initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world))
    model.config = model.llava.config
    run = trainer(model, world, tmp_path, "--save_steps", 1, "--save_strategy", "steps")
    run.model = run.model_wrapped = model
    del model.config
    run.train()
    assert [entry["mm_fuser_cross_gate"] > 0 for entry in run.state.log_history if "loss" in entry] == [True] * 3
    after = state(model)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state(model), after)


def groups_of(run):
    fuser = {id(parameter) for parameter in find_projector(run.model).fuser.parameters()}
    return {group["lr"] for group in run.optimizer.param_groups for value in group["params"] if id(value) in fuser}


class OwnOptimizer(LLaVATrainer):
    def create_optimizer(self):
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        return self.optimizer


class OwnScheduler(transformers.Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        return self.lr_scheduler


def with_optimizer(run, scheduler):
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-2)
    if scheduler:
        run.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, factor=1.0)
    return run


@pytest.mark.parametrize("way", ["LLaVATrainer", "Trainer", "own create_optimizer", "optimizer given", "both given"])
def test_whoever_makes_the_optimizer_the_fuser_has_its_rate_or_the_run_is_refused(world, tmp_path, way):
    kind = {"Trainer": transformers.Trainer, "own create_optimizer": OwnOptimizer}.get(way, LLaVATrainer)
    run = trainer(initialized(plain(world), world, "--mm_fuser_lr", 3e-3), world, tmp_path, kind=kind)
    if "given" in way:
        with_optimizer(run, scheduler=way == "both given")
    if way == "both given":
        with pytest.raises(ValueError, match="mm_fuser_lr=0.003, but the optimizer and the scheduler that the Trainer"):
            run.train()
        return
    run.train()
    assert groups_of(run) == {3e-3}


@pytest.mark.parametrize("kind", [transformers.Trainer, OwnOptimizer, OwnScheduler, "optimizer given", "both given"])
def test_whoever_makes_the_optimizer_a_frozen_identity_is_refused(world, tmp_path, kind):
    model = initialized(plain(world), world)
    model.get_model().mm_projector.requires_grad_(False)
    run = trainer(model, world, tmp_path, kind=LLaVATrainer if isinstance(kind, str) else kind)
    if isinstance(kind, str):
        rest = [parameter for name, parameter in model.named_parameters() if "mm_projector" not in name]
        run.optimizer = torch.optim.AdamW(rest, lr=1e-2)
    if kind == "both given":
        run.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, factor=1.0)
    with pytest.raises(ValueError, match="still an identity and would not be trained"):
        run.train()


def test_logging_on_one_rank_runs_no_collective(world, tmp_path, monkeypatch):
    """Gates are gathered in the step that every rank takes, and `Trainer.log` is transformers' own."""
    where = []

    def gathered(parameters, modifier_rank=None):
        where.append({frame.name for frame in __import__("traceback").extract_stack()})
        return wrappers.gathered(parameters, modifier_rank)

    monkeypatch.setattr(ours, "gathered", gathered)
    run = trainer(initialized(plain(world), world), world, tmp_path)
    run.log({"loss": 1.0})
    assert where == [] and "mm_fuser_cross_gate" not in run.state.log_history[-1]
    run.train()
    assert "mm_fuser_cross_gate" in run.state.log_history[-2]
    assert all("_maybe_log_save_evaluate" in names or "check_trained" in names for names in where[1:])


@pytest.mark.slow
@pytest.mark.deepspeed_cpu
def test_zero3_outlives_a_log_on_rank_0_alone(world, tmp_path):
    script = tmp_path / "talking.py"
    script.write_text(f"""
import runpy, sys, transformers
sys.path[:0] = [{str(host.HERE)!r}]
class Talk(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 0:
            self.trainer.log({{"loss": 1.0, "mine": 2.0}})
init = transformers.Trainer.__init__
def with_talk(self, *args, **kwargs):
    init(self, *args, **kwargs)
    Talk.trainer = self
    self.add_callback(Talk())
transformers.Trainer.__init__ = with_talk
runpy.run_path({str(host.HERE / "deepspeed_cpu.py")!r}, run_name="__main__")
""")
    output = tmp_path / "llava"
    command, env = host.deepspeed_command(world, output, host.zero(tmp_path, 3))
    command = [script if part == host.HERE / "deepspeed_cpu.py" else part for part in command]
    done = host.run(command, env=env, timeout=300)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any("mine" in entry for entry in history), done.stdout[-2000:]
    assert all("mm_fuser_cross_gate" in entry for entry in history if "learning_rate" in entry)


# Forks


@pytest.fixture
def fork(tmp_path):
    """A copy of the real LLaVA with texts replaced in its files; returns the environment that imports it."""

    def make(*changes):
        folder = tmp_path / "fork"
        shutil.copytree(host.train_py().parent.parent, folder / "llava")
        for file, old, new in changes:
            path = folder / "llava" / file
            text = path.read_text() if path.exists() else ""
            assert old in text
            path.write_text(text.replace(old, new) if old else new)
        return host.environment(PYTHONPATH=str(folder))

    return make


CLIP, ARCH = "model/multimodal_encoder/clip_encoder.py", "model/llava_arch.py"


def test_a_fork_with_another_siglip_trains_its_clip_tower_and_starts_silently(world, tmp_path, fork):
    own = "class SiglipEncoder:\n    def forward(self, pixels):\n        return pixels\n"
    env = fork(("model/multimodal_encoder/siglip_encoder.py", "", own))
    launcher = [sys.executable, "-m", "llava_mmfuser", "run"]
    done = host.train(world, tmp_path / "plain", launcher=launcher, env=env, mm_projector_type="mlp2x_gelu")
    assert "llava_mmfuser" not in done.stdout.replace(str(host.ROOT), "")
    done = host.train(world, tmp_path / "fused", launcher=launcher, env=env)
    assert "fuser weights: fresh" in done.stdout and "does not fit" not in done.stdout
    report = host.run([sys.executable, "-m", "llava_mmfuser", "status"], env=env).stdout
    assert "active: yes" in report and "absent  llava.model.multimodal_encoder.siglip_encoder" in report


def test_a_forks_further_arguments_reach_it(world, tmp_path, fork):
    env = fork(
        (ARCH, "def initialize_vision_modules(self, model_args, fsdp=None):", INITIALIZE),
        (CLIP, "def __init__(self, vision_tower, args, delay_load=False):", TOWER_INIT),
    )
    code = f"""
import sys
sys.path[:0] = [{str(host.HERE)!r}]
from pathlib import Path
from tiny import LlavaLlamaForCausalLM, arguments, small_config
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
world = Path({str(world)!r})
for kind in ("mlp2x_gelu", "mmfuser"):
    model = LlavaLlamaForCausalLM(small_config())
    model.get_model().initialize_vision_modules(model_args=arguments(world, mm_projector_type=kind), tokens=7)
    assert model.config.tokens == 7, kind
    tower = CLIPVisionTower(str(world / "clip"), args=arguments(world, mm_projector_type=kind), scale=3)
    assert tower.scale == 3 and isinstance(tower.select_layer, list) == (kind == "mmfuser"), kind
"""
    host.python(code, env=env)


INITIALIZE = """def initialize_vision_modules(self, model_args, fsdp=None, *, tokens=None):
        self.config.tokens = tokens"""
TOWER_INIT = """def __init__(self, vision_tower, args, delay_load=False, scale=1):
        self.__dict__["scale"] = scale"""


def test_a_host_whose_select_layer_is_a_text_keeps_it(world, tmp_path, fork):
    old = "mm_vision_select_layer: Optional[int] = field(default=-1)"
    env = fork(
        ("train/train.py", old, old.replace("Optional[int]", "Optional[str]").replace("=-1", "='-1'")),
        (
            CLIP,
            "self.select_layer = args.mm_vision_select_layer",
            "self.select_layer, self.texts = -2, args.mm_vision_select_layer",
        ),
    )
    code = f"""
import sys, transformers
sys.path[:0] = [{str(host.HERE)!r}]
from pathlib import Path
from tiny import LlavaLlamaForCausalLM, small_config
import llava.train.train as upstream
world = Path({str(world)!r})
parser = transformers.HfArgumentParser((upstream.ModelArguments, upstream.TrainingArguments))
flags = ["--vision_tower", str(world / "clip"), "--output_dir", "out", "--use_cpu", "True"]
for kind, layers in (("mlp2x_gelu", "-2_-5"), ("mlp2x_gelu", "list-2/-5"), ("mmfuser", "3,7")):
    further = ["--mm_projector_type", kind, "--mm_vision_select_layer=" + layers]
    given = parser.parse_args_into_dataclasses(flags + further)
    assert given[0].mm_vision_select_layer == layers
    model = LlavaLlamaForCausalLM(small_config())
    model.get_model().initialize_vision_modules(given[0])
    tower = model.get_vision_tower()
    assert tower.select_layer == ([3, 7] if kind == "mmfuser" else -2)
    assert kind == "mmfuser" or tower.texts == layers == model.config.mm_vision_select_layer
"""
    host.python(code, env=env)
