"""The projector of a LLaVA that is built or trained."""

import copy
import logging
from typing import Any, Sequence

from ..block.kinds import FUSIONS
from ..block.leaves import own_random_state, reset
from ..block.sampling import select_implementation
from ..checkpoints.adapter import check_shapes
from ..config import PROJECTOR_TYPE, MMFuserConfig, asks_for_fuser
from ..hidden_states import return_layers
from ..names import describe
from ..patching import applied
from ..projector import MMFuserProjector
from ..towers import check_features
from .optimizer import RATES, parse_rate
from .run import check_arguments, other_type, resolve_run, seed
from .wrappers import gathered, is_wrapper, unwrapped

logger = logging.getLogger("llava_mmfuser")


def build_vision_projector(original, config, *args, **kwargs):
    settings = MMFuserConfig.from_llava(config)
    inner_config = copy.copy(config)
    inner_config.mm_projector_type = settings.projector
    # The inner projector first: it gets the same initial weights as in a run without the fuser.
    inner = original(inner_config, *args, **kwargs)
    return MMFuserProjector.build(settings, config.mm_hidden_size, inner)


def concerns_fuser(self: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the arguments ask for a fuser, or the model has one."""
    holder = getattr(self, "mm_projector", None)
    return asks_for_fuser(*args, **kwargs) or isinstance(unwrapped(holder), MMFuserProjector)


def initialize_vision_modules(original, self, model_args, *args, **kwargs):
    if not asks_for_fuser(model_args):
        raise ValueError(other_type(model_args))
    fsdp = kwargs.get("fsdp", args[0] if args else None)
    if fsdp:
        raise ValueError(
            f"fsdp={fsdp} together with mm_projector_type={PROJECTOR_TYPE} is not supported; use DeepSpeed instead"
        )
    holder: Any = getattr(self, "mm_projector", None)
    projector = unwrapped(holder)
    fused = isinstance(projector, MMFuserProjector)
    check_arguments(model_args)
    _check_trainer(model_args)
    run = resolve_run(model_args, self.config.to_dict())
    settings, adapter, source = run.settings, model_args.pretrain_mm_mlp_adapter, "the checkpoint" if fused else None
    model_args = copy.copy(model_args)
    vars(model_args).update(settings.to_llava(), pretrain_mm_mlp_adapter=None)
    query = model_args.mm_vision_select_layer
    if not isinstance(query, int) or query % (run.tower.num_hidden_layers + 1) != settings.layers[-1]:
        model_args.mm_vision_select_layer = settings.layers[-1]
    if projector is not None and not fused:
        projector = _put_fuser_in_front(projector, settings, self.get_vision_tower())
        wrapped = is_wrapper(holder)
        self.mm_projector = type(holder)(projector, holder.active_adapter) if wrapped else projector
    self.config.update(settings.to_llava())
    for name in RATES:  # as upstream keeps mm_projector_lr
        setattr(self.config, name, parse_rate(name, getattr(model_args, name, None)))
    original(self, model_args, *args, **kwargs)
    tower = self.get_vision_tower()
    if not isinstance(getattr(tower, "select_layer", None), list):  # a class of the host without a row
        raise ValueError(
            f"vision_tower={model_args.vision_tower!r}: {type(tower).__name__} returns one layer; with "
            f"mm_projector_type={PROJECTOR_TYPE} use a tower that LLaVA reads by its CLIPVisionTower or LLaVA-NeXT by "
            f"its SigLipVisionTower"
        )
    projector = unwrapped(self.mm_projector)
    if self.mm_projector is not projector:
        self.mm_projector.original_module.requires_grad_(False)  # upstream unfreezes all that is below mm_projector
    projector.lr, projector.gate_lr = self.config.mm_fuser_lr, self.config.mm_fuser_gate_lr
    projector.log_gates = getattr(model_args, "mm_fuser_log_gates", True)
    if run.adapter is not None and run.shapes != projector.shapes():
        check_shapes(adapter, run.adapter, projector.shapes(), describe(run.adapter))
    with gathered(projector.parameters(), modifier_rank=0):
        if seed() is not None:
            with own_random_state(seed()):
                reset(projector.fuser, projector.missing if fused else dict(projector.fuser.named_parameters()))
        if run.adapter is not None:
            projector.load_state_dict(run.adapter)
            source = adapter if projector.num_loaded or not FUSIONS[settings.fusion].has_weights else source
    report(projector, settings, source)


def _check_trainer(model_args: Any) -> None:
    refusal = applied.get(
        "llava.train.llava_trainer",
        "it needs LLaVATrainer, which has not been imported; train with it or drop the flag",
    )
    for name in RATES:
        rate = getattr(model_args, name, None)
        if rate is not None and refusal is not None:
            raise ValueError(f"{name}={rate}: {refusal}")


def _put_fuser_in_front(projector: Any, settings: MMFuserConfig, tower: Any) -> MMFuserProjector:
    check_features(tower)
    fused = MMFuserProjector.build(settings, tower.hidden_size, projector)
    like = next(projector.parameters())
    fused.fuser.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    return_layers(tower, settings.layers)
    return fused


def report(projector: MMFuserProjector, settings: MMFuserConfig, source: Any, missing: Sequence[str] = ()) -> None:
    """One line: layers, attention, implementation, where the weights came from (None: nowhere), how many were there."""
    like = next(projector.fuser.parameters(), next(projector.parameters()))
    sampling = select_implementation(like.device, like.dtype)
    total = sum(1 for _ in projector.fuser.parameters())
    if total == 0:
        weights = "it has none"
    elif source is None:
        weights = "fresh, starts as identity" if settings.starts_as_identity else "fresh"
    elif not missing:
        weights = f"from {source}"
    elif len(missing) == total:
        weights = f"none of {total} tensors is in {source}; starts as identity unless an adapter follows"
    else:
        weights = f"{total - len(missing)} of {total} tensors from {source}, fresh: {', '.join(missing)}"
    logger.log(
        logging.WARNING if missing else logging.INFO,
        "%s%s -> %s; fuser weights: %s",
        settings.summary(),
        f" ({sampling} on {like.device})" if "num_points" not in settings.without_effect else "",
        settings.projector,
        weights,
    )
    if not FUSIONS[settings.fusion].starts_as_identity and source is None:
        logger.warning(
            "mm_fuser_fusion=%s does not start as an identity: a released LLaVA answers otherwise until it is trained",
            settings.fusion,
        )
