"""MMFuser (arXiv 2410.11829) for an unmodified LLaVA: ``--mm_projector_type mmfuser``.

Importing this package imports nothing heavy: it runs at every interpreter start, so the API below is resolved on use.

Where things live, from LLaVA inwards:

* ``activation`` (import hook), ``llava_patch`` (the table of what is replaced), ``patching`` (how), ``installation``
  (`status`), ``hooks`` (what stands in LLaVA's place)
* ``towers`` (kinds of them), ``hidden_states`` (several in one pass), ``projector`` (the block before LLaVA's own),
  ``block`` (torch only)
* ``config`` (every setting), ``layers`` (which of the tower's), ``names`` (of weights)
* ``__main__`` (the command line), ``checkpoints`` (inspect, convert, upgrade), ``export``, ``visualize``
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
