"""The import hook, which patches modules of LLaVA right after their import. Standard library only.

A ``.pth`` in site-packages calls `install` at every interpreter start, so this module must be cheap. It must never
raise, because LLaVA swallows all exceptions during its import.
"""

import importlib
import os
import sys

TABLE = "llava_mmfuser.llava_patch"
# After the import of one of these modules, its rows in the table are applied.
TRIGGERS = (
    "llava.model.llava_arch",
    "llava.model.builder",
    "llava.train.llava_trainer",
    "transformers.models.llava.modeling_llava",
)
# Modules that a trigger imports -> the trigger, which is patched again when the module is reloaded.
SOURCES = {
    "llava.model.multimodal_encoder.clip_encoder": "llava.model.llava_arch",
    "llava.model.multimodal_encoder.siglip_encoder": "llava.model.llava_arch",
    "llava.model.multimodal_projector.builder": "llava.model.llava_arch",
}
DISABLE = "LLAVA_MMFUSER_DISABLE"


class _Finder:
    """Lets the other finders search, and makes the loader of a trigger patch it."""

    def find_spec(self, name, path=None, target=None):
        for finder in sys.meta_path if name in TRIGGERS or name in SOURCES else ():
            if not isinstance(finder, _Finder) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    _patch_after_exec(spec.loader)
                    return spec
        return None


_finder = _Finder()


def _patch_after_exec(loader):
    exec_module = getattr(loader, "exec_module", None)
    if exec_module is None or getattr(exec_module, "hooked", False):  # all modules of a zip archive share a loader
        return

    def exec_and_patch(module):
        name = getattr(module.__spec__, "name", module.__name__)
        trigger = SOURCES.get(name, name)
        if _finder not in sys.meta_path or trigger not in TRIGGERS:
            return exec_module(module)
        again = _revert(trigger)  # else the new definitions would count as patched
        try:
            exec_module(module)
        except BaseException:
            if again:  # the old definitions stay in use
                _apply(trigger)
            raise
        if again or name == trigger:
            _apply(trigger)

    loader.exec_module = exec_and_patch
    loader.exec_module.hooked = True


def _revert(trigger):
    revert = getattr(sys.modules.get(TABLE), "revert", None)
    return revert is not None and revert(trigger)


def _apply(trigger):
    try:
        importlib.import_module(TABLE).apply(trigger)
    except Exception as error:  # behind LLaVA's `except: pass`, the user would see a misleading ImportError
        if sys.stderr is not None:
            sys.stderr.write("llava_mmfuser: LLaVA is left unpatched: %s: %s\n" % (type(error).__name__, error))


def disabled():
    """Whether ``LLAVA_MMFUSER_DISABLE`` is set, and not to ``0``."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def install():
    """Called by the ``.pth``: `activate`, unless `disabled`."""
    if not disabled():
        activate()


def activate():
    """Patch LLaVA now if it is imported, else after its import. Idempotent.

    ``LLAVA_MMFUSER_DISABLE`` does not stop this call: it switches off the automatic hook alone.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for trigger in TRIGGERS:
        module = sys.modules.get(trigger)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _apply(trigger)


def deactivate():
    """Undo `activate`: remove the hook and put LLaVA's functions back. Existing models keep their fuser."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for trigger in TRIGGERS:
        _revert(trigger)
