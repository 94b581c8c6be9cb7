"""Every setting of the fuser: default, help text, validation, and its place in a LLaVA config."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from .block.kinds import ATTENTION_KINDS, FUSIONS, OUTPUTS, STARTS, check_num_heads, check_settings
from .layers import LAYER_SETS, Layers, is_listed

PROJECTOR_TYPE = "mmfuser"
FLAG_PREFIX = "mm_fuser_"


# No `from __future__ import annotations` here: flags are made from these fields' types.
@dataclass(frozen=True)
class MMFuserConfig:
    """Settings of the fuser. In a LLaVA config and on the command line field ``x`` is called ``mm_fuser_x``.

    Raises:
        ValueError: a value that is not allowed, with the setting, the value and what is allowed.
    """

    layers: Layers = field(
        default=Layers((-2,), "uniform"),
        metadata={
            "help": "hidden_states indices fed to the fuser, shallow first, the query layer last, or a set below "
            "--mm_vision_select_layer: %s. If not given: uniform." % ", ".join(LAYER_SETS)
        },
    )
    projector: str = field(
        default="mlp2x_gelu",
        metadata={"help": "LLaVA projector behind the fuser: linear or mlpNx_gelu. If not given: mlp2x_gelu."},
    )
    fusion: str = field(
        default="mmfuser",
        metadata={
            "help": "How the layers are fused: %s; all but mmfuser are simple baselines. If not given: mmfuser."
            % ", ".join(FUSIONS)
        },
    )
    attention: str = field(
        default="deformable",
        metadata={
            "help": "Attention kind inside the fuser: %s. If not given: deformable." % ", ".join(ATTENTION_KINDS)
        },
    )
    self_attention: bool = field(
        default=True, metadata={"help": "Refine the cross-attention's output by self-attention. If not given: True."}
    )
    num_heads: int = field(
        default=16, metadata={"help": "Attention heads; must divide the tower's width. If not given: 16."}
    )
    num_points: int = field(
        default=4, metadata={"help": "Sampling points per head and level of deformable attention. If not given: 4."}
    )
    window_size: int = field(
        default=3, metadata={"help": "Side of the neighbourhood in window attention, odd. If not given: 3."}
    )
    output: str = field(
        default="add",
        metadata={
            "help": "How the fused detail enters: %s, that is through columns of its own in the projector's first "
            "layer. If not given: add, the paper's." % " or ".join(OUTPUTS)
        },
    )
    start: str = field(
        default="identity",
        metadata={
            "help": "How a fresh fuser starts: %s, which only a fresh projector may have behind it. If not given: "
            "identity, the paper's." % " or ".join(STARTS)
        },
    )

    def __post_init__(self):
        object.__setattr__(self, "layers", Layers.parse(self.layers, "mm_fuser_layers"))
        if not re.fullmatch(r"linear|mlp[1-9]\d?x_gelu", str(self.projector)):
            raise ValueError(
                f"mm_fuser_projector={self.projector!r} is not allowed; use linear or mlpNx_gelu with "
                f"N from 1 to 99, such as mlp2x_gelu"
            )
        check_settings(vars(self))

    @property
    def num_layers(self) -> int:
        """Number of feature maps."""
        return self.layers.num_layers

    @property
    def starts_as_identity(self) -> bool:
        """Whether a released LLaVA answers as before with a fresh fuser in front."""
        return FUSIONS[self.fusion].starts_as_identity and self.start == "identity"

    @property
    def without_effect(self) -> Tuple[str, ...]:
        """Fields that mean nothing under this fusion and attention kind."""
        of_kinds = dict(ATTENTION_KINDS)
        if self.fusion == "mmfuser":
            del of_kinds[self.attention]
        unused = tuple(name for names in of_kinds.values() for name in names)
        return (
            unused
            if self.fusion == "mmfuser"
            else ("attention", "self_attention", "num_heads", "output", "start", *unused)
        )

    def refuse_useless(self, given: Dict[str, Any]) -> None:
        """Raise ValueError for settings the user gave (without prefix) that mean nothing here."""
        for name in self.without_effect:
            if name in given:
                cause = "attention" if self.fusion == "mmfuser" else "fusion"
                raise ValueError(
                    f"mm_fuser_{name}={given[name]} has no effect with mm_fuser_{cause}={getattr(self, cause)}; drop it"
                )

    def build(self, hidden_size: int, out_features: int) -> Any:
        """A fresh fusion of these settings.

        Args:
            hidden_size: width of the feature maps.
            out_features: width of the first layer of the projector behind it.

        Raises:
            ValueError: heads that do not divide the width.
        """
        from .block.rivals import build_fusion

        names = ("num_heads", "num_points", "attention", "self_attention", "window_size", "output", "start")
        of_mmfuser = {name: getattr(self, name) for name in names}
        return build_fusion(self.fusion, hidden_size, self.num_layers, out_features, **of_mmfuser)

    def summary(self) -> str:
        """Layers and fusion in a few words."""
        if self.fusion != "mmfuser":
            return f"hidden_states {self.layers} -> {self.fusion}"
        own = "".join(f", {name} {getattr(self, name)}" for name in ATTENTION_KINDS[self.attention])
        return (
            f"hidden_states {self.layers} -> {self.attention} attention"
            f"{' + self-attention' if self.self_attention else ''}, num_heads {self.num_heads}{own}"
            f"{', output columns' if self.output == 'columns' else ''}{', start open' if self.start == 'open' else ''}"
        )

    def resolve(self, vision_config: Any) -> "MMFuserConfig":
        """Check the settings against a `TowerConfig` and return them with explicit, non-negative layers.

        Raises:
            ValueError: layers that the tower does not have, or heads that do not divide its width.
        """
        if self.fusion == "mmfuser":
            check_num_heads(vision_config.hidden_size, self.num_heads)
        layers = self.layers.resolve(vision_config.num_hidden_layers, vision_config.num_deleted)
        return dataclasses.replace(self, layers=layers)

    @classmethod
    def from_llava(cls, source: Any) -> "MMFuserConfig":
        """Read the ``mm_fuser_*`` settings of a LLaVA config, a config.json (dict) or `ModelArguments`; absent or None
        means default.

        The layers are ``mm_fuser_layers``, else ``mm_vision_select_layer``.
        """
        given, select_layer = explicit_settings(source), read_setting(source, "mm_vision_select_layer")
        if "layers" not in given and select_layer is not None:
            given["layers"] = Layers.parse(select_layer)
        return cls(**given)

    def difference(self, other: "MMFuserConfig") -> Optional[str]:
        """The first field with another value in `other`, or None; fields that mean nothing here do not count."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.without_effect]
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def to_llava(self) -> Dict[str, Any]:
        """The flat ``mm_fuser_*`` keys for ``config.json``; call it on what `resolve` returned."""
        flat = {FLAG_PREFIX + f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        flat["mm_fuser_layers"] = list(self.layers)
        return flat


def asks_for_fuser(*args: Any, **kwargs: Any) -> bool:
    """Whether an argument of a call, such as a config or `ModelArguments`, has ``mm_projector_type=mmfuser``."""
    return any(getattr(value, "mm_projector_type", None) == PROJECTOR_TYPE for value in (*args, *kwargs.values()))


def read_setting(source: Any, name: str) -> Any:
    """A setting of a LLaVA config, a config.json (dict) or `ModelArguments`; None where it is absent."""
    return source.get(name) if isinstance(source, dict) else getattr(source, name, None)


def explicit_settings(source: Any) -> Dict[str, Any]:
    """The ``mm_fuser_*`` settings that the user gave, without the prefix; layers also from a listed select layer."""
    given = {f.name: read_setting(source, FLAG_PREFIX + f.name) for f in dataclasses.fields(MMFuserConfig)}
    select_layer = read_setting(source, "mm_vision_select_layer")
    if given["layers"] is None and select_layer is not None:
        given["layers"] = Layers.parse(select_layer) if is_listed(select_layer) else None
    elif given["layers"] is not None:
        given["layers"] = Layers.parse_listed(given["layers"], select_layer)
    return {name: value for name, value in given.items() if value is not None}
