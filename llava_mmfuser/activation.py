"""The import hook: patches modules of LLaVA right after they have been imported. Standard library only.

A one-line ``.pth`` in site-packages calls `install` at every interpreter start, so this module must stay cheap, and it
must never raise: LLaVA swallows every exception that is raised while it is imported.
"""

import os
import sys

TRIGGERS = ("llava.model.llava_arch", "llava.model.builder", "llava.train.llava_trainer")  # keys of llava_patch.PATCHES
DISABLE = "LLAVA_MMFUSER_DISABLE"


class _Finder:
    """Meta-path finder that leaves the search to the others and adds one step after a trigger module has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in TRIGGERS:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if find_spec is None or isinstance(finder, _Finder):
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                _patch_after_exec(spec.loader)
                return spec
        return None


_finder = _Finder()


def _patch_after_exec(loader):
    exec_module = getattr(loader, "exec_module", None)
    if exec_module is None:
        return

    def exec_and_patch(module):
        exec_module(module)
        if _finder in sys.meta_path:
            _apply(module.__name__)

    loader.exec_module = exec_and_patch


def _apply(trigger):
    try:
        from llava_mmfuser import llava_patch

        llava_patch.apply(trigger)
    except Exception as error:  # LLaVA's `except: pass` would turn this into a misleading ImportError
        sys.stderr.write("llava_mmfuser: LLaVA is left unpatched: %s: %s\n" % (type(error).__name__, error))


def disabled():
    """True where ``LLAVA_MMFUSER_DISABLE`` is set to anything but ``0`` or nothing."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def install():
    """What the ``.pth`` runs: `activate`, unless `disabled`."""
    if not disabled():
        activate()


def activate():
    """Hook LLaVA: at once where it is already imported, else as soon as it is. Idempotent.

    An explicit call also works where ``LLAVA_MMFUSER_DISABLE`` is set: the variable switches off the automatic hook.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for trigger in TRIGGERS:
        module = sys.modules.get(trigger)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _apply(trigger)


def deactivate():
    """Undo `activate`: remove the hook and put LLaVA's own functions back. Models already built keep their fuser."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    patch = sys.modules.get("llava_mmfuser.llava_patch")
    if patch is not None:
        patch.revert()
