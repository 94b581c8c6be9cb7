import os
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
README = HERE / "README.md"
PTH = "llava_mmfuser.pth"
# Quiet where the package is gone but the line is not, as after deleting the clone of an editable install.
PTH_LINE = "import sys; exec('try:\\n import llava_mmfuser.activation as a; a.install()\\nexcept ImportError: pass')\n"


class BuildPyWithHook(build_py):
    """Puts the one-line .pth that installs the import hook at the root of site-packages."""

    def run(self):
        super().run()
        target = self._pth_path()
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).write_text(PTH_LINE)

    def _pth_path(self):
        if getattr(self, "editable_mode", False):
            return os.path.join(self.get_finalized_command("install").install_lib, PTH)
        return os.path.join(self.build_lib, PTH)

    def get_outputs(self, *args, **kwargs):
        return super().get_outputs(*args, **kwargs) + [self._pth_path()]


setup(
    name="llava-mmfuser",
    version=re.search(r'__version__ = "(.+)"', (HERE / "llava_mmfuser" / "__init__.py").read_text()).group(1),
    description="MMFuser for an unmodified LLaVA: --mm_projector_type mmfuser",
    # Away from the repository its relative links lead nowhere: their texts stay.
    long_description=re.sub(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", README.read_text(encoding="utf-8"))
    if README.exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.8",
    packages=find_packages(include=["llava_mmfuser", "llava_mmfuser.*"]),
    package_data={"llava_mmfuser": ["py.typed"]},
    # Nothing that LLaVA pins: installing this package must not change LLaVA's environment.
    install_requires=[],
    extras_require={
        "train": ["deepspeed", "peft"],
        "flash": ["flash-attn"],
        "triton": ["triton"],
        "export": ["protobuf", "sentencepiece"],
        "visualize": ["matplotlib"],
        "dev": ["pytest", "pytest-xdist", "ruff==0.17.6", "mypy==2.4.1", "scikit-learn", "scikit-image", "matplotlib"],
    },
    entry_points={"vllm.general_plugins": ["llava_mmfuser = llava_mmfuser.export.vllm_plugin:register"]},
    cmdclass={"build_py": BuildPyWithHook},
)
