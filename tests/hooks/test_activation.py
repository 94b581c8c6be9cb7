"""Installing, the import hook, drifted LLaVAs, and the command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import host
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SHOW_HOOK = (
    "import sys; print(sorted(m for m in sys.modules if m.startswith(('llava', 'torch', 'transformers'))), "
    "[type(f).__module__ for f in sys.meta_path if 'mmfuser' in type(f).__module__])"
)
HOOKED = "['llava_mmfuser', 'llava_mmfuser.activation'] ['llava_mmfuser.activation']"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the repository, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", ".demo", ".test", "build", "*.egg-info", "__pycache__")
    )
    return folder


def site_packages(environment):
    return next((environment / "lib").glob("python*")) / "site-packages"


def files(environment):
    return {
        str(path.relative_to(environment))
        for path in site_packages(environment).rglob("*")
        if "__pycache__" not in path.parts
    }


OLD_TOOLS = ["setuptools==68.2.2", "wheel"]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize(
    "how,tools",
    [([], []), (["--editable"], []), (["--no-build-isolation", "--editable"], OLD_TOOLS)],
    ids=["regular", "editable", "editable with old tools"],
)
def test_installing_adds_one_package_and_uninstalling_leaves_nothing(source, tmp_path, how, tools):
    environment = tmp_path / "env"
    host.run([sys.executable, "-m", "venv", environment])
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if tools:
        host.run(pip + ["install", "--quiet"] + tools)
    before, frozen = files(environment), host.run(pip + ["freeze", "--all"]).stdout.split()
    host.run(pip + ["install", "--quiet"] + how + [source])
    added = [line for line in host.run(pip + ["freeze", "--all"]).stdout.splitlines() if line not in frozen]
    added = [line for line in added if not line.startswith("#")]
    assert len(added) == 1 and ("llava-mmfuser" in added[0] or str(source) in added[0]), added
    assert (site_packages(environment) / "llava_mmfuser.pth").read_text().count("\n") == 1
    assert "--editable" in how or (site_packages(environment) / "llava_mmfuser" / "py.typed").exists()

    for options in ([], ["-I"]):
        assert host.run([python] + options + ["-c", SHOW_HOOK]).stdout.strip() == HOOKED
    assert host.run([python, "-S", "-c", SHOW_HOOK]).stdout.strip() == "[] []"
    disabled = host.run([python, "-c", SHOW_HOOK], env=host.environment(LLAVA_MMFUSER_DISABLE="1")).stdout.strip()
    assert disabled == HOOKED.split("] [")[0] + "] []"

    if "--editable" in how:
        source.rename(source.with_name("moved"))
        assert host.run([python, "-c", "pass"]).stdout == "", "a clone that is gone must not disturb the interpreter"
        source.with_name("moved").rename(source)
    host.run(pip + ["uninstall", "--quiet", "--yes", "llava-mmfuser"])
    assert files(environment) == before
    assert host.run([python, "-c", SHOW_HOOK]).stdout.strip() == "[] []"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes_have_the_hook(tmp_path, method):
    script = tmp_path / "workers.py"
    script.write_text(f"""
import multiprocessing, sys
def hooked(_):
    return any("mmfuser" in type(finder).__module__ for finder in sys.meta_path)
if __name__ == "__main__":
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        assert pool.map(hooked, [0]) == [True]
""")
    host.run([sys.executable, script])


LATE = """
import llava.model.llava_arch as arch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from transformers import HfArgumentParser, PreTrainedModel
import llava_mmfuser
def symbols():
    return [arch.build_vision_projector, arch.LlavaMetaModel.initialize_vision_modules, CLIPVisionTower.__init__,
            HfArgumentParser.__init__, PreTrainedModel._initialize_weights,
            PreTrainedModel.__dict__["_load_pretrained_model"]]
untouched = symbols()
assert not any(symbol.__code__.co_freevars == ("call",) for symbol in untouched[:3])
llava_mmfuser.activate()
patched = symbols()
assert all(a is not b for a, b in zip(untouched, patched))
llava_mmfuser.activate()
assert symbols() == patched, "activating twice changes nothing"
assert llava_mmfuser.status()["active"]
llava_mmfuser.deactivate()
assert all(a is b for a, b in zip(untouched, symbols())), "the very same objects are back"
assert not llava_mmfuser.status()["active"]
llava_mmfuser.activate()
assert llava_mmfuser.status()["active"]
"""


def test_patches_apply_late_are_idempotent_and_revert():
    host.python(LATE, env=host.environment(LLAVA_MMFUSER_DISABLE="1"))


@pytest.fixture
def drifted(tmp_path):
    """Makes a copy of the real LLaVA with one text replaced in one of its files."""

    def make(file, old, new):
        folder = tmp_path / "drifted"
        shutil.copytree(host.train_py().parent.parent, folder / "llava")
        path = folder / "llava" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return host.environment(PYTHONPATH=str(folder)), folder

    return make


ARCH = "model/llava_arch.py"
CLIP, BUILDER = "model/multimodal_encoder/clip_encoder.py", "model/multimodal_projector/builder.py"


@pytest.mark.parametrize(
    "file,old,new,target,state,detail",
    [
        (CLIP, "feature_select", "select_features", "CLIPVisionTower.feature_select", "missing", "not found"),
        (
            CLIP,
            "def forward(self, images)",
            "def forward(self, pixels, images=None)",
            "CLIPVisionTower.forward",
            "changed",
            "expected parameters (self, images), found (self, pixels, images)",
        ),
        (
            BUILDER,
            "(config, delay_load=False, **kwargs)",
            "(config, **kwargs)",
            "builder:build_vision_projector",
            "changed",
            "expected parameters (config, delay_load, kwargs), found (config, kwargs)",
        ),
    ],
)
def test_drifted_llava_is_left_alone_and_says_why(drifted, file, old, new, target, state, detail):
    env, folder = drifted(file, old, new)
    code = """
from types import SimpleNamespace
from llava.model.multimodal_projector.builder import build_vision_projector
settings = dict(mm_hidden_size=8, hidden_size=8, mm_vision_select_layer=-2)
print(type(build_vision_projector(SimpleNamespace(mm_projector_type="mlp2x_gelu", **settings))).__name__)
from llava.model.llava_arch import LlavaMetaModel
try:  # a checkpoint that has a projector never reaches the builder
    LlavaMetaModel.initialize_vision_modules(SimpleNamespace(), SimpleNamespace(mm_projector_type="mmfuser"))
except RuntimeError as error:
    print(error)
build_vision_projector(SimpleNamespace(mm_projector_type="mmfuser", **settings))
"""
    done = host.python(code, env=env, check=False)
    assert done.returncode == 1 and "Sequential" in done.stdout
    reasons = [line for line in done.stdout.splitlines() if "llava_mmfuser does not fit this LLaVA" in line]
    assert len(reasons) == 3, "on import, for an existing projector, for a new one"
    for line in reasons:
        assert target in line and detail in line and str(folder) in line and "llava_mmfuser status" in line, done.stdout
    report = host.run([sys.executable, "-m", "llava_mmfuser", "status"], env=env, check=False)
    assert report.returncode == 1 and "active: no" in report.stdout
    assert any(line.split()[0] == state and target in line for line in report.stdout.splitlines() if line.strip())


def test_drifted_trainer_only_takes_away_what_needs_it(world, tmp_path, drifted):
    old = "_save_checkpoint(self, model, trial, metrics=None)"
    env, _ = drifted("train/llava_trainer.py", old, "_save_checkpoint(self, model, trial, extra=None, metrics=None)")
    launcher = [sys.executable, "-m", "llava_mmfuser", "run"]
    reason = "llava.train.llava_trainer is left unpatched: llava.train.llava_trainer:LLaVATrainer._save_checkpoint"
    done = host.train(world, tmp_path / "llava", launcher=launcher, env=env)
    assert reason in done.stdout and "fuser weights: fresh" in done.stdout
    assert "mm_fuser_cross_gate" not in (tmp_path / "llava" / "trainer_state.json").read_text()
    done = host.train(world, tmp_path / "rate", launcher=launcher, env=env, check=False, mm_fuser_lr=1e-4)
    assert done.returncode and "mm_fuser_lr=0.0001: llava_mmfuser does not fit this LLaVA" in done.stdout
    assert reason in done.stdout.splitlines()[-1] and not (tmp_path / "rate").exists()


def test_status_shows_every_target_and_where_llava_is():
    from llava_mmfuser.llava_patch import NATIVE, PATCHES

    report = host.run([sys.executable, "-m", "llava_mmfuser", "status"]).stdout
    assert "active: yes" in report and f"llava: {host.train_py().parent.parent}" in report
    assert "cpu: embedding_bag" in report and "transformers: 4.37.2" in report
    assert "exported folders: no, they need transformers 4.57 or newer, and this is 4.37.2" in report
    for row in sum(PATCHES.values(), ()):
        state = "absent" if row.host == "LLaVA-NeXT" or row in PATCHES[NATIVE] else "ok"
        assert any(line.split()[:2] == [state, row.target] for line in report.splitlines() if line.strip()), row.target


def status_of(env):
    done = host.run([sys.executable, "-m", "llava_mmfuser", "status"], env=env, check=False)
    return done.returncode, done.stdout


def test_status_says_what_llava_swallowed(drifted):
    env, _ = drifted(ARCH, "from abc import", "raise OSError('libcudart.so.12: cannot open')\nfrom abc import")
    code, report = status_of(env)
    assert code == 1 and report.startswith(
        "active: no, LLaVA cannot be imported: OSError: libcudart.so.12: cannot open"
    )


def test_status_outlives_a_module_that_exits_and_one_without_functions(drifted):
    env, folder = drifted(ARCH.replace("llava_arch", "builder"), "import os", "raise SystemExit(3)\nimport os")
    (folder / "llava" / CLIP).open("a").write("\nCLIPVisionTower.forward = 'text'\n")
    code, report = status_of(env)
    assert code == 1 and "loading: no, LLaVA cannot be imported: SystemExit: 3" in report
    assert "CLIPVisionTower.forward  (expected a function, found str)" in report


def test_status_of_a_llava_without_training_code(drifted):
    env, folder = drifted(ARCH, "from abc import", "print('a host that talks')\nfrom abc import")
    shutil.rmtree(folder / "llava" / "train")
    command = [sys.executable, "-m", "llava_mmfuser", "status"]
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, timeout=600)  # without stderr
    lines = ["active: yes, without training", "  models: yes", "  loading: yes"]
    assert done.returncode == 0 and done.stdout.splitlines()[:3] == lines and "talks" not in done.stdout
    assert f"  training: no, {folder / 'llava'} has no llava.train\n" in done.stdout


RELOAD = """
import importlib, sys
NAMES = ("llava.model.llava_arch", "llava.model.builder", "llava.train.llava_trainer",
         "llava.model.multimodal_encoder.clip_encoder", "llava.model.multimodal_projector.builder")
from llava_mmfuser import deactivate, llava_patch
def symbols():
    arch, loader, trainer, clip, builder = map(importlib.import_module, NAMES)
    return [arch.build_vision_projector, arch.LlavaMetaModel.initialize_vision_modules, builder.build_vision_projector,
            loader.load_pretrained_model, trainer.LLaVATrainer.create_optimizer, clip.CLIPVisionTower.__init__]
def patched():
    return [symbol.__code__.co_freevars == ("call",) for symbol in symbols()]  # else it looks as the original
assert all(patched())
for name in NAMES:
    importlib.reload(sys.modules[name])
    assert all(patched()), name
for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
    del sys.modules[name]
assert all(patched()), "imported anew"
deactivate()
assert not any(patched())
"""


def test_reloaded_modules_stay_patched():
    host.python(RELOAD)


def test_status_in_an_environment_without_torch(source):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "llava_mmfuser", "status"], cwd=source, text=True, stdout=subprocess.PIPE
    )
    assert done.returncode == 1
    assert done.stdout.startswith("active: no, ModuleNotFoundError: No module named 'torch'; this is the environment ")


def test_run_takes_scripts_and_modules_where_the_hook_is_off(tmp_path):
    env = host.environment(LLAVA_MMFUSER_DISABLE="1", PYTHONPATH=str(tmp_path))
    script = tmp_path / "my_script.py"
    script.write_text("""
import sys
from types import SimpleNamespace
from llava.model.multimodal_projector.builder import build_vision_projector
config = SimpleNamespace(mm_projector_type="mmfuser", mm_hidden_size=32, hidden_size=8, mm_vision_select_layer=-2)
print(__name__, sys.argv[1:], type(build_vision_projector(config)).__name__)
""")
    done = host.run([sys.executable, "-m", "llava_mmfuser", "run", "absent.py"], env=env, check=False)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1 and "'absent.py' cannot be run" in done.stdout
    for target in (script, "my_script"):
        done = host.run([sys.executable, "-m", "llava_mmfuser", "run", target, "--flag", "value"], env=env)
        assert done.stdout.splitlines()[-1] == "__main__ ['--flag', 'value'] MMFuserProjector"
    done = host.run([sys.executable, script], env=env, check=False)
    assert done.stdout.splitlines()[-1] == "ValueError: Unknown projector type: mmfuser"


def test_source_patch_does_what_the_hook_does(world, tmp_path):
    """patches/: the real sources, patched; the automatic hook off. Training is bit-equal to the hook's."""
    import torch
    from tiny import SEEDED

    folder = tmp_path / "vendored"
    shutil.copytree(host.train_py().parent.parent, folder / "llava")
    patch = next((ROOT / "patches").glob("*.patch"))
    host.run(
        ["git", "apply", "--verbose", patch], cwd=folder, env=dict(os.environ, GIT_CEILING_DIRECTORIES=str(tmp_path))
    )
    launcher = [sys.executable, "-c", SEEDED]
    vendored = host.environment(LLAVA_MMFUSER_DISABLE="1", PYTHONPATH=str(folder))
    done = host.train(world, tmp_path / "patched", launcher=launcher, env=vendored)
    assert "fuser weights: fresh" in done.stdout
    host.train(world, tmp_path / "hooked", launcher=launcher)
    patched, hooked = (torch.load(tmp_path / name / "mm_projector.bin") for name in ("patched", "hooked"))
    assert patched.keys() == hooked.keys() and all(torch.equal(value, hooked[name]) for name, value in patched.items())
    host.run(
        ["git", "apply", "--reverse", patch], cwd=folder, env=dict(os.environ, GIT_CEILING_DIRECTORIES=str(tmp_path))
    )
    done = host.train(world, tmp_path / "unpatched", env=vendored, check=False)
    assert "Unknown projector type: mmfuser" in done.stdout
