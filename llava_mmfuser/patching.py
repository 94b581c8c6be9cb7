"""How symbols of another package are checked, replaced and put back. What is replaced: `llava_patch`."""

import functools
import importlib
import inspect
import os
import sys
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Tuple


class Patch(NamedTuple):
    """One row: what is replaced (None: only relied upon), by what, which parameters it must have, and why."""

    target: str
    replacement: Optional[Callable]
    parameters: Tuple[str, ...]
    reason: str


_originals: Dict[str, Any] = {}
_owners: Dict[str, Any] = {}  # what has the replaced attribute; its module may have been imported anew since


def check_row(row: Patch) -> Tuple[str, str]:
    """State of a row's target, ``ok``, ``missing`` or ``changed``, and what was expected and found. Imports it."""
    try:
        owner, name = _owner(row.target)
        found = _originals.get(row.target) or inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        return "missing", f"not found ({error})"
    except (Exception, SystemExit) as error:  # of the code of a module that is being imported
        return "missing", f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    try:
        parameters = tuple(inspect.signature(getattr(found, "__func__", found)).parameters)
    except (TypeError, ValueError):
        return "changed", f"expected a function, found {type(found).__name__}"
    if isinstance(found, classmethod):
        parameters = parameters[1:]
    if parameters[: len(row.parameters)] != row.parameters:
        return "changed", f"expected parameters ({', '.join(row.parameters)}), found ({', '.join(parameters)})"
    if row.replacement is None:
        return "ok", "relied upon"
    return "ok", "patched" if row.target in _originals else "not patched"


def replace(target: str, replacement: Callable) -> None:
    """Make `target` call ``replacement(original, …)``, original bound to the class where it is a class method."""
    owner, name = _owner(target)
    original = inspect.getattr_static(owner, name)
    call = getattr(original, "__func__", original)

    if isinstance(original, classmethod):

        @functools.wraps(call)
        def wrapper(cls, *args, **kwargs):
            return replacement(functools.partial(call, cls), *args, **kwargs)

        setattr(owner, name, classmethod(wrapper))
    else:

        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            return replacement(call, *args, **kwargs)

        setattr(owner, name, wrapper)
    _originals[target], _owners[target] = original, owner


def restore(targets: Optional[Iterable[str]] = None) -> None:
    """Put the originals of these targets back, or all."""
    for target in list(_originals if targets is None else targets):
        if target in _originals:
            setattr(_owners.pop(target), target.rpartition(".")[2].rpartition(":")[2], _originals.pop(target))


def folder_of(module: str) -> Optional[str]:
    """Folder of the top-level package of a module, or None where it is not imported."""
    package = sys.modules.get(module.partition(".")[0])
    file = getattr(package, "__file__", None)
    return os.path.dirname(file) if file else next(iter(getattr(package, "__path__", ())), None)


def _owner(target: str) -> Tuple[Any, str]:
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name
