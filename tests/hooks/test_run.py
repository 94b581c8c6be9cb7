"""What users do to the set-up of a training run: seeds, frozen parts, the best checkpoint, PEFT's modules_to_save."""

import copy
import os
from types import SimpleNamespace

import llava.train.train as upstream
import peft
import pytest
import torch
import transformers
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.llava_trainer import LLaVATrainer

from llava_mmfuser.block.kinds import ATTENTION_KINDS, FUSIONS
from llava_mmfuser.hooks import optimizer as ours
from llava_mmfuser.hooks.wrappers import find_projector

WRAPPED = dict(r=2, target_modules=["q_proj"], modules_to_save=["mm_projector"])
TINY = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def parsed(world, output, *flags):
    """Upstream's own argument classes, read by its own parser."""
    classes = upstream.ModelArguments, upstream.DataArguments, upstream.TrainingArguments
    given = f"--vision_tower {world / 'clip'} --mm_vision_select_layer -2 --mm_projector_type mmfuser --use_cpu True"
    given = f"{given} --model_name_or_path {world / 'llama'} --output_dir {output} --report_to none".split()
    return transformers.HfArgumentParser(classes).parse_args_into_dataclasses(given + list(map(str, flags)))


def plain(world, **settings):
    """A LLaVA with a trained MLP and no fuser."""
    return initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world, mm_projector_type="mlp2x_gelu", **settings)


def initialized(model, world, *flags, **settings):
    arguments = parsed(world, "unused", *flags)[0]
    for name, value in settings.items():
        setattr(arguments, name, value)
    model.get_model().initialize_vision_modules(arguments)
    return model


def woken(model):
    """The same model with a fuser that has been trained."""
    with torch.no_grad():
        for parameter in find_projector(model).parameters():
            parameter.uniform_(-0.1, 0.1)
    return model


def trainer(model, world, output, *flags, stage_1=False, kind=LLaVATrainer, **options):
    """Upstream's Trainer on a few random samples, with upstream's own switches of stage 1 and of freezing."""
    flags = flags + ("--per_device_train_batch_size", 2, "--max_steps", 3, "--logging_steps", 1)
    arguments = parsed(world, output, *flags, "--learning_rate", 1e-2, "--lr_scheduler_type", "constant")[2]
    arguments.tune_mm_mlp_adapter = model.config.tune_mm_mlp_adapter = stage_1
    if stage_1:
        model.requires_grad_(False)
        for parameter in model.get_model().mm_projector.parameters():
            parameter.requires_grad = True
    for name, value in options.items():
        setattr(arguments, name, value)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([1, -200, 5, 6])
    samples = [
        dict(input_ids=ids, labels=ids.clamp(min=0), images=torch.rand(3, 28, 28, generator=generator))
        for _ in range(6)
    ]
    return kind(model=model, args=arguments, train_dataset=samples, eval_dataset=samples)


def state(model):
    return {name: value.detach().clone() for name, value in find_projector(model).named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("start", ["language model", "released", "fuser missing"])
@pytest.mark.parametrize(
    "kind",
    ["deformable"]
    + [
        pytest.param(kind, marks=pytest.mark.matrix)
        for kind in (*ATTENTION_KINDS, *FUSIONS)
        if kind not in ("deformable", "mmfuser")
    ],
)
def test_fresh_fuser_follows_the_seed_and_all_else_is_as_without_it(world, tmp_path, kind, start):
    flags = ("--mm_fuser_attention" if kind in ATTENTION_KINDS else "--mm_fuser_fusion", kind)

    def made(kind, disturbance, *flags):
        torch.manual_seed(disturbance)
        model = LlavaLlamaForCausalLM(LlavaConfig(**TINY))
        torch.manual_seed(7)  # what upstream draws itself
        if start == "released":
            initialized(model, world, mm_projector_type="mlp2x_gelu")
        if start == "fuser missing" and kind == "mmfuser":
            torch.manual_seed(7)
            initialized(model, world, *flags)
            folder = tmp_path / f"llava-{disturbance}"
            lacking = {n: v for n, v in model.state_dict().items() if ".fuser." not in n and "vision_tower" not in n}
            model.save_pretrained(folder, state_dict=lacking)
            torch.manual_seed(disturbance)
            model = LlavaLlamaForCausalLM.from_pretrained(folder)
        torch.manual_seed(7)
        initialized(model, world, *flags, mm_projector_type=kind, mm_patch_merge_type="flat")
        return model, torch.rand(4)

    (first, next_1), (second, next_2) = (made("mmfuser", seed, *flags, "--seed", 3) for seed in (1, 2))
    assert same(state(first), state(second))
    other, _ = made("mmfuser", 1, *flags, "--seed", 4)
    random = [name for name, value in find_projector(first).fuser.named_parameters() if name.endswith("_proj.weight")]
    assert bool(random) == (kind in ATTENTION_KINDS)
    drawn = [state(first)["fuser." + name] for name in random]
    assert not any(torch.equal(value, state(other)["fuser." + name]) for value, name in zip(drawn, random))
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    if start != "fuser missing":
        without, next_3 = made("mlp2x_gelu", 1)
        mlp = dict(without.get_model().mm_projector.named_parameters())
        assert same(mlp, {name: value for name, value in state(first).items() if not name.startswith("fuser.")})
        assert torch.equal(next_1, next_3) and torch.equal(next_1, next_2)


def test_projector_built_by_hand_follows_torchs_generator(world):
    from llava.model.multimodal_projector.builder import build_vision_projector

    config = LlavaConfig(**TINY, mm_projector_type="mmfuser", mm_hidden_size=64, mm_vision_select_layer=-2)

    def built(seed):
        torch.manual_seed(seed)
        return dict(build_vision_projector(config).named_parameters())

    assert same(built(1), built(1)) and not same(built(1), built(2))


@pytest.mark.parametrize("kind", ["stage 1", "lora", "full", "lora wrapped"])
def test_best_model_comes_back_with_its_projector(world, tmp_path, kind):
    class Worse(LLaVATrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_loss": float(self.state.global_step)}

    model = initialized(LlavaLlamaForCausalLM(LlavaConfig(**TINY)), world)
    if "lora" in kind:
        settings = WRAPPED if "wrapped" in kind else dict(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        find_projector(model).requires_grad_(True)
    flags = "--save_steps 1 --save_strategy steps --evaluation_strategy steps --eval_steps 1".split()
    run = trainer(
        model, world, tmp_path, *flags, "--load_best_model_at_end", True, kind=Worse, stage_1=kind == "stage 1"
    )
    steps = []
    run.add_callback(Remember(lambda: steps.append(state(model))))
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1") and len(steps) == 3
    assert same(state(model), steps[0]) and not same(steps[0], steps[-1])
    if kind != "full":
        (file,) = [
            f for f in os.listdir(tmp_path / "checkpoint-1") if f in ("mm_projector.bin", "non_lora_trainables.bin")
        ]
        assert all("modules_to_save" not in name for name in torch.load(tmp_path / "checkpoint-1" / file))
        os.unlink(tmp_path / "checkpoint-1" / file)
        with pytest.raises(ValueError, match=f"checkpoint-1/{file}: no such file"):
            run._load_best_model()


class Remember(transformers.TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, *args, **kwargs):
        self.call()


@pytest.mark.parametrize("kind", ["full", "lora", "stage 1"])
@pytest.mark.parametrize(
    "fusion",
    ["mmfuser", "mean"]
    + [pytest.param(name, marks=pytest.mark.matrix) for name in ("weighted_sum", "channel_concat", "dense_channel")],
)
def test_fresh_fuser_cannot_be_frozen(world, tmp_path, monkeypatch, kind, fusion):
    said = []
    monkeypatch.setattr(ours.logger, "info", said.append)

    def run(prepare):
        model = initialized(plain(world), world, "--mm_fuser_fusion", fusion)
        prepare(model)
        model.config.use_cache = False
        if kind == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        made = trainer(model, world, tmp_path, stage_1=kind == "stage 1", freeze_mm_mlp_adapter=True)
        model.get_model().mm_projector.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        made.create_optimizer()
        return said

    if fusion == "mean":
        assert run(lambda model: None) == []
        return
    with pytest.raises(ValueError, match="still an identity and would not be trained.*Drop --freeze_mm_mlp_adapter"):
        run(lambda model: None)
    assert run(woken) == ["the fuser is not trained in this run; it stays as it was trained before"]


def test_frozen_fuser_is_refused_before_the_model_is_read(world, tmp_path):
    adapter = tmp_path / "mm_projector.bin"
    mlp, fuser = plain(world), initialized(plain(world), world)
    for model, allowed in ((mlp, False), (fuser, True)):
        torch.save({"model." + n: v for n, v in model.get_model().state_dict().items() if "mm_projector" in n}, adapter)
        flags = "--freeze_mm_mlp_adapter", True, "--pretrain_mm_mlp_adapter", adapter
        if allowed:
            parsed(world, tmp_path, *flags)
            continue
        for given in (flags, flags[:2]):
            with pytest.raises(ValueError, match="freeze_mm_mlp_adapter=True, but the fuser is still an identity"):
                parsed(world, tmp_path, *given)
    parsed(world, tmp_path, "--freeze_mm_mlp_adapter", True, "--mm_fuser_fusion", "mean")
    parsed(world, tmp_path, "--freeze_mm_mlp_adapter", True, "--model_name_or_path", "someone/on-the-hub")


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_fuser_is_refused_under_deepspeeds_own_optimizer(world, frozen):
    model = initialized(plain(world), world)
    model.get_model().mm_projector.requires_grad_(not frozen)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"optimizer": {}}))
    state = SimpleNamespace(deepspeed_plugin=plugin)
    given = SimpleNamespace(model=model, accelerator=SimpleNamespace(state=state))
    if not frozen:
        assert ours.deepspeed_init(lambda *args: args, given, 5) == (given, 5)
        return
    with pytest.raises(ValueError, match="still an identity and would not be trained"):
        ours.deepspeed_init(lambda *args: args, given, 5)


@pytest.mark.parametrize("start", ["released", "fuser", "wrapped afterwards"])
def test_projector_in_pefts_modules_to_save_trains_saves_resumes_and_loads(world, tmp_path, monkeypatch, start):
    """PEFT keeps the frozen original beside the copy that is trained."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    base = plain(world) if start == "released" else woken(initialized(plain(world), world))
    base = base.float()

    def made():
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**WRAPPED))
        return model if start == "wrapped afterwards" else initialized(model, world, "--mm_fuser_lr", 1e-3)

    model = made()
    before = state(model)
    assert start == "released" or same(before, state(base))
    wrapper = model.get_model().mm_projector
    assert find_projector(model) is wrapper.modules_to_save["default"]
    run = trainer(model, world, tmp_path, "--save_steps", 1, "--save_strategy", "steps")
    run.train()
    after, original = state(model), dict(wrapper.original_module.named_parameters())
    assert all(not parameter.requires_grad for parameter in original.values())
    assert not any(
        torch.equal(value, before[name]) for name, value in after.items() if "gate" in name or name[0] in "02"
    )
    logged = [entry["mm_fuser_cross_gate"] for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3 and logged[-1] == pytest.approx(after["fuser.cross_gate.scale"].abs().mean().item())
    if start != "wrapped afterwards":
        held = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        assert {held[id(p)] for p in find_projector(model).fuser.parameters()} == {1e-3}

    resumed = made()
    again = trainer(resumed, world, tmp_path, "--save_steps", 2, "--save_strategy", "steps")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(state(resumed), after)
    if start != "wrapped afterwards":
        find_projector(resumed).lr = resumed.config.mm_fuser_lr = None
        with pytest.raises(ValueError, match="was trained with mm_fuser_lr=0.001, but this run has None; resume with"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    if start == "wrapped afterwards":  # as PEFT itself saves and loads
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint-3")
        assert same(state(loaded), after)

    # As train.py saves LoRA, and as builder.py reads it.
    folder = tmp_path / "llava-lora"
    lora = upstream.get_peft_state_maybe_zero_3(model.named_parameters(), "none")
    others = upstream.get_peft_state_non_lora_maybe_zero_3(model.named_parameters())
    model.save_pretrained(folder, state_dict=lora)
    model.config.save_pretrained(folder)
    torch.save(others, folder / "non_lora_trainables.bin")
    plain_language_model = LlavaLlamaForCausalLM(LlavaConfig.from_pretrained(folder))
    others = {
        name[len("base_model.model.") :]: value
        for name, value in torch.load(folder / "non_lora_trainables.bin").items()
    }
    plain_language_model.load_state_dict(others, strict=False)
    merged = peft.PeftModel.from_pretrained(plain_language_model, folder).merge_and_unload()
    assert same(state(merged), after)
