"""The import hook: patches modules of LLaVA right after they have been imported. Standard library only.

A one-line ``.pth`` in site-packages calls `install` at every interpreter start, so this module must stay cheap, and it
must never raise: LLaVA swallows every exception that is raised while it is imported.
"""

import importlib
import os
import sys

TABLE = "llava_mmfuser.llava_patch"
# Modules after whose import their rows in the table are applied.
TRIGGERS = (
    "llava.model.llava_arch",
    "llava.model.builder",
    "llava.train.llava_trainer",
    "transformers.models.llava.modeling_llava",
)
# Modules that a trigger has imported by then; read anew (importlib.reload), they are patched with their trigger.
SOURCES = {
    "llava.model.multimodal_encoder.clip_encoder": "llava.model.llava_arch",
    "llava.model.multimodal_encoder.siglip_encoder": "llava.model.llava_arch",
    "llava.model.multimodal_projector.builder": "llava.model.llava_arch",
}
DISABLE = "LLAVA_MMFUSER_DISABLE"


class _Finder:
    """Meta-path finder that leaves the search to the others and adds one step after a trigger module has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in TRIGGERS and name not in SOURCES:
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
    if exec_module is None or getattr(exec_module, "hooked", False):  # a zip archive has one loader for all modules
        return

    def exec_and_patch(module):
        name = getattr(module.__spec__, "name", module.__name__)
        trigger = SOURCES.get(name, name)
        if _finder not in sys.meta_path or trigger not in TRIGGERS:
            return exec_module(module)
        again = _revert(trigger)  # else what is read anew would be taken for patched
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
    except Exception as error:  # LLaVA's `except: pass` would turn this into a misleading ImportError
        if sys.stderr is not None:
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
    for trigger in TRIGGERS:
        _revert(trigger)
