"""lmms-eval in an environment of its own, laid over LLaVA's, and its runs: one process per checkpoint and task."""

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

HARNESS = "lmms-eval==0.7.3"  # needs Python >= 3.10; its wish for transformers >= 4.39.2 is metadata only
# What its LLaVA model and the tasks in suites.py import. Newer ones of those with a bound broke it or LLaVA.
REQUIREMENTS = (
    "datasets==2.21.0 evaluate==0.4.6 pandas==2.2.3 pyarrow<21 filelock==3.16.1 openai==1.99.9 sacrebleu==2.6.0 "
    "loguru==0.7.3 jsonlines==4.0.0 pytablewriter==1.2.1 tenacity==9.1.2 tqdm-multiprocess==0.0.11 sqlitedict==2.1.0 "
    "latex2sympy2==1.5.4 antlr4-python3-runtime==4.11.0 pycocoevalcap==1.2 openpyxl==3.1.5 huggingface_hub<1"
).split()
# What of LLaVA's environment must not be shadowed by another version.
KEPT = "torch torchvision transformers tokenizers accelerate peft numpy pillow safetensors sentencepiece".split()
INSIDE = Path(__file__).resolve().parent / "inside.py"


def environment(root: Path) -> Path:
    """The Python of the harness's environment below `root`, which is made where there is none.

    It is a virtual environment without packages of LLaVA's: those are read from where they are, so LLaVA's environment
    stays as it is, and the import hook works. It appears under its name once it is complete.
    """
    if sys.version_info < (3, 10):
        raise ValueError(f"Python is {sys.version.split()[0]}: {HARNESS} needs 3.10 or later, as LLaVA advises")
    own = _installed()
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


def _installed() -> Dict[str, str]:
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


def describe(python: Path, names: List[str], include: Optional[str]) -> Dict:
    """What inside.py says about these names."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tasks.json"
        command = [
            str(python),
            str(INSIDE),
            "describe",
            str(out),
            *names,
            *(["--include_path", include] * bool(include)),
        ]
        with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            complaint = process.communicate()[1]
        if process.returncode:
            raise ValueError(f"lmms-eval does not start in {python.parent.parent}:\n{complaint[-3000:]}")
        return json.loads(out.read_text())


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


def score(python: Path, model: Model, task: str, target: Path, gpus: int, model_args: str, flags: List[str]) -> None:
    """Ask one task of one checkpoint: `target` gets lmms-eval's results and samples. Raises ValueError with the reason.

    Its output goes to a log beside `target`, the progress of it to the terminal.
    """
    place = {0: ["device=cpu", "device_map=auto"]}.get(gpus, [])
    arguments = ",".join(["pretrained=" + re.sub(r"[=,]", "_", model.name), *place, *filter(None, [model_args])])
    launch = [str(python)]
    if gpus > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(gpus)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(free_port())]
    log = target.with_name(target.name + ".log")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(target.parent, target.name) as made, open(log, "wb") as output:
        command = [*launch, str(INSIDE), "score", "--model", "llava", "--model_args", arguments, "--tasks", task]
        command += ["--output_path", str(made), "--log_samples", *flags]
        environ = {**os.environ, "EVALUATE_MODEL": json.dumps(model), "TRANSFORMERS_VERBOSITY": "error"}
        with running(command, env=environ, stdout=output, stderr=subprocess.STDOUT) as process:
            _wait(process, log)
        found = list(made.glob("*/[0-9]*_results.json"))  # lmms-eval ends with 0 after an error, too
        if process.returncode or len(found) != 1:
            raise ValueError(f"{_reason(log.read_text(errors='replace'))} (log: {log})")
        own = found[0].parent
        for file in own.iterdir():
            file.rename(made / re.sub(r"^\d+_\d+_", "", file.name))
        own.rmdir()
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def _wait(process: subprocess.Popen, log: Path) -> None:
    shown = ""
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        if sys.stderr.isatty():
            with open(log, "rb") as lines:
                lines.seek(max(0, log.stat().st_size - 2000))
                bars = re.findall(r"[^\r\n]*%\|[^\r\n]*", lines.read().decode(errors="replace"))
            if bars and bars[-1] != shown:
                shown = bars[-1]
                sys.stderr.write(f"\r\033[K{shown[:120]}")
    if shown:
        sys.stderr.write("\r\033[K")


def _reason(log: str) -> str:
    """The error that a log ends with."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|NotFound|IsEnabled)\w*: .*)$", log, re.MULTILINE)
    errors = [error for error in errors if not error.startswith("RetryError")]
    reason = (errors or log.strip().splitlines() or ["no output"])[-1].strip()
    return f"NO DATA: {reason}" if re.search(r"in (download|load_dataset)\b", log) else reason


def results(target: Path, task: str) -> Dict:
    """What lmms-eval found for a task: metric -> number."""
    found = json.loads((target / "results.json").read_text())["results"][task]
    scores = {name.split(",")[0]: value for name, value in found.items() if "_stderr" not in name}
    numbers = (int, float)
    return {name: value for name, value in scores.items() if isinstance(value, numbers) and value == value}


def answers(target: Path, task: str, metric: str) -> Dict:
    """Question -> what lmms-eval logged for `metric`; a question that is not of this metric is absent."""
    with open(target / f"samples_{task}.jsonl", encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    return {sample["doc_id"]: sample[metric] for sample in samples if metric in sample}
