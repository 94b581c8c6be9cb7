"""lmms-eval by its own command, in an environment of its own that is laid over LLaVA's."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

from housekeeping import free_port, stop, uninterrupted

from evaluation.suites import SUITES

HARNESS = "lmms-eval==0.7.3"  # needs Python >= 3.10; its wish for transformers >= 4.39.2 is metadata only
# What its LLaVA model and the tasks in suites.py import. Newer ones of those with a bound broke it or LLaVA.
REQUIREMENTS = (
    "datasets==2.21.0 evaluate==0.4.6 pandas==2.2.3 pyarrow<21 filelock==3.16.1 openai==1.99.9 sacrebleu==2.6.0 "
    "loguru==0.7.3 jsonlines==4.0.0 pytablewriter==1.2.1 tenacity==9.1.2 tqdm-multiprocess==0.0.11 sqlitedict==2.1.0 "
    "latex2sympy2==1.5.4 antlr4-python3-runtime==4.11.0 pycocoevalcap==1.2 openpyxl==3.1.5 huggingface_hub<1"
).split()
# What of LLaVA's environment must not be shadowed by another version.
KEPT = "torch torchvision transformers tokenizers accelerate peft numpy pillow safetensors sentencepiece".split()
PLUGIN = Path(__file__).resolve().parent / "plugin"


def environment(root: Path) -> Path:
    """The Python of the harness's environment below `root`, which is made where there is none.

    It is a virtual environment without packages of LLaVA's: those are read from where they are, so LLaVA's environment
    stays as it is, and the import hook works. It appears under its name once it is complete.
    """
    if sys.version_info < (3, 10):
        raise ValueError(f"Python is {sys.version.split()[0]}: {HARNESS} needs 3.10 or later, as LLaVA advises")
    own = installed()
    kept = [f"{name}=={own[name].split('+')[0]}" for name in KEPT if name in own]
    lacking = [name for name in ("torch", "transformers") if name not in own]
    if lacking:
        raise ValueError(
            f"{sys.executable} has no {' and no '.join(lacking)}: take LLaVA's, by PYTHON=… or activating it"
        )
    about = json.dumps([sys.prefix, sys.version, HARNESS, REQUIREMENTS, kept])
    folder = root / f"lmms-eval-{hashlib.sha1(about.encode()).hexdigest()[:10]}"
    python = folder / "bin" / "python"
    if python.exists():
        return python
    print(f"== making {folder} with {HARNESS} (about 250 MB, once)", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    with _scratch(root, folder.name) as made:
        _check(sys.executable, "-m", "venv", "--without-pip", str(made))
        packages = next(made.glob("lib/python*/site-packages"))
        folders = site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE)
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (packages / "zz_llava.pth").write_text("".join(lines))  # behind its own packages
        (made / "kept.txt").write_text("\n".join(kept))
        pip = (str(made / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check")
        _check(*pip, "--constraint", str(made / "kept.txt"), *REQUIREMENTS)
        _check(*pip, "--no-deps", HARNESS)
        with contextlib.suppress(OSError):  # another call was faster
            made.rename(folder)
    return python


def installed() -> Dict[str, str]:
    found = importlib.metadata.distributions()
    return {(one.metadata["Name"] or "").lower().replace("-", "_"): one.version for one in found}


def _check(*command: str) -> None:
    with running(command) as process:
        if process.wait():
            raise ValueError(f"{' '.join(command)}\nended with exit code {process.returncode}; nothing was left behind")


@contextlib.contextmanager
def _scratch(parent: Path, name: str) -> Iterator[Path]:
    """A new folder, gone afterwards unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(command: Sequence[str], **options) -> Iterator[subprocess.Popen]:
    """A process group that ends with the block: nothing keeps a GPU after Ctrl-C."""
    started: List[subprocess.Popen] = []
    try:
        with uninterrupted():
            started.append(subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, **options))
        yield started[0]
    finally:
        stop(started)  # a launcher passes it on to its own groups


class Model(NamedTuple):
    """A checkpoint as LLaVA loads it: path or hub name, base, and the name by which LLaVA knows its kind."""

    path: str
    base: Optional[str]
    name: str

    def identity(self, *more) -> str:
        """Changes with any file of the checkpoint or its base, and with what else the answers depend on."""
        folders = [Path(part) for part in (self.path, self.base) if part and Path(part).is_dir()]
        return hashlib.sha1(json.dumps([self, [files(folder) for folder in folders], more]).encode()).hexdigest()[:10]


def files(folder: Path, pattern: str = "*") -> List:
    """Name, size and time of the files that fit."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def score(
    python: Path, model: Model, tasks: Sequence[str], target: Path, gpus: int, model_args: str, flags: Sequence[str]
) -> None:
    """Ask these tasks of one checkpoint: `target` gets lmms-eval's results and samples.

    Its output and progress go to a log beside `target`. Raises ValueError with the reason.
    """
    arguments = [f"pretrained={model.path}", f"model_name={model.name}", *([f"base={model.base}"] * bool(model.base))]
    arguments += ["device=cpu", "device_map=auto"] * (gpus == 0) + [model_args] * bool(model_args)
    command = [str(python), "-m", "lmms_eval"]
    if gpus > 1:
        launch = f"--multi_gpu --num_processes {gpus} --num_machines 1 --mixed_precision no --dynamo_backend no"
        launch = f"accelerate.commands.launch {launch} --main_process_port {free_port()} -m lmms_eval"
        command[2:] = launch.split()
    log = target.with_name(target.name + ".log")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(target.parent, target.name) as made, open(log, "wb") as output:
        command += ["--model", "llava_and_pictures", "--model_args", ",".join(arguments), "--tasks", ",".join(tasks)]
        command += ["--output_path", str(made), "--log_samples", *flags]
        paths = os.pathsep.join(filter(None, [str(PLUGIN), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, "PYTHONPATH": paths, "EVALUATE_PICTURES": str(made), "TRANSFORMERS_VERBOSITY": "error"}
        with running(command, env=environ, stdout=output, stderr=subprocess.STDOUT) as process:
            process.wait()
        found = list(made.glob("*/[0-9]*_results.json"))  # lmms-eval ends with 0 after an error, too
        if process.returncode or len(found) != 1:
            raise ValueError(f"{_reason(log.read_text(errors='replace'))} (log: {log})")
        own = found[0].parent
        for file in own.iterdir():
            file.rename(made / re.sub(r"^\d+_\d+_", "", file.name))
        own.rmdir()
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


NO_DATA = (
    "its data could not be read: {}. Get it once with network and HF_TOKEN set; it is kept below HF_HOME (here {}), "
    "which you may copy, then with HF_DATASETS_OFFLINE=1; or give a task of your own that reads local files, by "
    "--include_path DIR"
)


def _reason(log: str) -> str:
    """The error that a log ends with, and what to do."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|NotFound|IsEnabled)\w*: .*)$", log, re.MULTILINE)
    errors = [error for error in errors if not error.startswith("RetryError")]
    reason = (errors or log.strip().splitlines() or ["no output"])[-1].strip()
    unknown = re.match(r"ValueError: Tasks not found: (.*)\. Try", reason)
    if unknown:
        return (
            f"{unknown[1]} is neither a suite ({', '.join(SUITES)}) nor a task of lmms-eval; "
            f"`python -m lmms_eval tasks list` prints its tasks, and tasks of your own need --include_path DIR"
        )
    if re.search(r"in (download|load_dataset)\b", log):
        return NO_DATA.format(reason, os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return reason


def results(target: Path) -> Dict[str, Dict[str, float]]:
    """What lmms-eval found: task -> metric -> number."""
    found = json.loads((target / "results.json").read_text())["results"]
    tasks = [file.name[len("samples_") : -len(".jsonl")] for file in sorted(target.glob("samples_*.jsonl"))]
    return {task: _numbers(found[task]) for task in tasks}


def _numbers(found: Dict) -> Dict[str, float]:
    scores = {name.split(",")[0]: value for name, value in found.items() if "_stderr" not in name}
    return {name: value for name, value in scores.items() if isinstance(value, (int, float)) and value == value}


def answers(target: Path, task: str, metric: str) -> Dict:
    """Question -> what lmms-eval logged for `metric`, and the picture; a question not of this metric is absent."""
    lines = [line for file in target.glob("pictures_*.jsonl") for line in file.read_text().splitlines()]
    pictures = {number: picture for of, number, picture in map(json.loads, lines) if of == task}
    with open(target / f"samples_{task}.jsonl", encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    return {one["doc_id"]: (one[metric], pictures[one["doc_id"]]) for one in samples if metric in one}
