"""What one evaluation runs on: checkpoint, data, LLaVA's code, GPUs."""

import argparse
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional


class Settings(NamedTuple):
    checkpoint: str
    name: str  # what the answers are filed under
    base: Optional[str]
    conv_mode: Optional[str]
    data: Path
    llava: Path  # the folder that holds llava/ and, in a checkout, scripts/
    output: Path
    gpus: List[str]
    force: bool
    changed: float  # when weights or config of the checkpoint or its base last changed; 0 for those on the hub
    work: Path  # temporary folder that LLaVA's scripts run in
    lock: Optional[int] = None  # file descriptor that holds the data folder, for the processes that write there

    @property
    def identity(self) -> Dict[str, Optional[str]]:
        """What answers must agree in to stand for one another, besides being newer than the checkpoint."""
        return {"checkpoint": self.checkpoint, "base": self.base, "conv_mode": self.conv_mode}

    @property
    def python_path(self) -> str:
        """PYTHONPATH with LLaVA's code in front: its converters import llava, but run from scripts/."""
        return os.pathsep.join(filter(None, (str(self.llava), os.environ.get("PYTHONPATH"))))

    @property
    def padded(self) -> bool:
        """Whether the checkpoint sees images padded to a square, as LLaVA-1.5 does."""
        config = Path(self.checkpoint) / "config.json"
        return not config.is_file() or json.loads(config.read_text()).get("image_aspect_ratio") == "pad"


def resolve(options: argparse.Namespace, work: Path) -> Settings:
    """Settings from the command line. Raises ValueError with what is wrong, what is allowed and what to do."""
    checkpoint = _model("CKPT", options.checkpoint)
    base = _model("--base", options.base) if options.base else None
    local = Path(checkpoint)
    path = checkpoint.split("/")
    loaded = "_".join(path[-2:]) if path[-1].startswith("checkpoint-") else path[-1]  # as LLaVA names a model
    if "llava" not in loaded.lower():
        raise ValueError(
            f"CKPT is {checkpoint}: its name lacks 'llava', so LLaVA would load a plain language model; rename it"
        )
    parts = [file for file in ("adapter_config.json", "mm_projector.bin") if (local / file).is_file()]
    whole = any(file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in local.glob(pattern))
    if parts and not whole and not base:  # released checkpoints are whole and have an mm_projector.bin, too
        raise ValueError(f"CKPT is {checkpoint}, which holds {parts[0]} and so is only a part: give its --base")
    if "adapter_config.json" in parts and "lora" not in loaded.lower():
        raise ValueError(f"CKPT is {checkpoint}, a LoRA: its name lacks 'lora', by which LLaVA knows one; rename it")
    _check_tower(local / "config.json")
    name = options.name or loaded
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"--name is {name}: letters, digits, '.', '_' and '-' only")
    llava = _llava(options.llava)
    data = Path(options.data or llava / "playground" / "data" / "eval").expanduser().resolve()
    if not data.is_dir():
        raise ValueError(f"--data is {data}: no such folder; make it and put the suites' data there (--list says what)")
    output = Path(options.output or data / "results" / name).expanduser().resolve()
    folders = [Path(part) for part in (checkpoint, base) if part and os.path.isabs(part)]
    patterns = ("*.safetensors", "*.bin", "config.json")
    weights = [file for folder in folders for pattern in patterns for file in folder.glob(pattern)]
    return Settings(
        checkpoint=checkpoint,
        name=name,
        base=base,
        conv_mode=options.conv_mode,
        data=data,
        llava=llava,
        output=output,
        gpus=[gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",") if gpu] or ["0"],
        force=options.force,
        changed=max((file.stat().st_mtime for file in weights), default=0.0),
        work=work,
    )


def _model(setting: str, given: str) -> str:
    """The full path of a folder, or a name on the hub. Raises ValueError where `given` is neither."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        return os.path.abspath(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) or folder.parent.is_dir():
        raise ValueError(f"{setting} is {given}: no such folder, and no name on the hub (owner/name); check the path")
    return given


def _check_tower(config: Path) -> None:
    """Raises ValueError where the vision tower is a folder that only the current folder's processes would find."""
    tower = config.is_file() and json.loads(config.read_text()).get("mm_vision_tower")
    if tower and not os.path.isabs(tower) and Path(tower).is_dir():
        raise ValueError(
            f"{config} has the mm_vision_tower {tower}, found from this folder, where LLaVA's scripts do not run; "
            f"write {os.path.abspath(tower)} there, or the tower's name on the hub"
        )


def _llava(given: Optional[str]) -> Path:
    """The LLaVA checkout: --llava, else the current folder, else what is installed."""
    if given:
        if not (Path(given) / "llava" / "eval").is_dir():
            raise ValueError(f"--llava is {given}: it has no llava/eval; give the folder of a LLaVA checkout")
        return Path(given).resolve()
    if (Path("llava") / "eval").is_dir():
        return Path.cwd()
    spec = importlib.util.find_spec("llava")
    if spec is None or spec.origin is None:
        raise ValueError("LLaVA is not installed in this Python, and this is not its folder: give --llava DIR")
    return Path(spec.origin).resolve().parent.parent
