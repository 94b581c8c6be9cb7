"""MMFuser (arXiv 2410.11829) for an unmodified LLaVA: ``--mm_projector_type mmfuser``.

Importing this package imports nothing heavy: it runs at every interpreter start, so the API below is resolved on use.

Where things live, from LLaVA inwards:

* hooking: ``activation`` (import hook), ``llava_patch`` (what of LLaVA is replaced, and why), ``patching`` (how),
  ``installation`` (what is installed and patched: `status`)
* in LLaVA's place: ``vision`` (several layers of the tower), ``projector``, ``trainer``
* the block: ``config`` (every setting), ``fuser``, ``attention``, ``ops`` (sampling), ``resettable`` (its leaf modules)
* its rivals: ``fusion`` (the simple fusions)
* pictures: ``visualize`` (drawing), ``feature_maps`` (what is drawn), ``pictures`` (of which files or URLs)
* checkpoints: ``checkpoint`` (names, shapes, adapters), ``inspection``, ``convert`` (what to write), ``writing`` (how)
* ``__main__``: the command line
"""

__version__ = "0.1.0"

_API = {
    "MMFuser": "block.mmfuser",
    "MMFuserConfig": "config",
    "MMFuserProjector": "projector",
    "activate": "activation",
    "deactivate": "activation",
    "status": "installation",
}
__all__ = ["__version__"] + sorted(_API)


def __getattr__(name):
    if name not in _API:
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    module = __import__("%s.%s" % (__name__, _API[name]), fromlist=[name])
    return getattr(module, name)


def __dir__():
    return sorted(set(globals()) | set(_API))
