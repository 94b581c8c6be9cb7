"""Checks, replaces and restores symbols of another package. `llava_patch` lists the symbols.

A replacement runs only where its row's `when` is true. Otherwise the original gets the arguments unchanged, even those
that a later host adds. So nothing changes unless a user asks for it.
"""

import functools
import importlib
import inspect
import os
import sys
import types
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple


class Patch(NamedTuple):
    """One row of the table."""

    target: str  # module:name, or module:class.name
    replacement: Optional[Callable]  # its first argument is the original; None means the target is only relied upon
    parameters: str  # the target's first parameters, separated by blanks; | separates versions
    reason: str
    until: str  # the change upstream that makes the row needless
    when: Optional[Callable[..., bool]] = None  # of the call's arguments: whether the replacement runs; None: always
    host: Optional[str] = None  # the only LLaVA with this target; other hosts are patched without the row


EXPORTED = "exported folders"  # the purpose of patching transformers' own LLaVA
HOOK_OFF = "the hook is off; call llava_mmfuser.activate()"
# Module of a host -> None, or why its rows were not applied. Written by `llava_patch.apply`.
applied: Dict[str, Optional[str]] = {}
_originals: Dict[str, Any] = {}
# target -> where `replace` wrote its stand-in, because a module may be imported again later
_places: Dict[str, List[Tuple[Any, str]]] = {}


def check_row(row: Patch) -> Tuple[str, str]:
    """State of a row's target, and a detail for the user. Imports the target's module.

    The state is ``ok``, ``absent`` (only another LLaVA has the target), ``missing`` or ``changed``.
    """
    try:
        owner, name = _owner(row.target)
        found = _originals.get(row.target) or inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        if row.host is not None and getattr(error, "name", None) == row.target.partition(":")[0]:
            return "absent", f"{row.host} has it"
        return "missing", f"not found ({error})"
    except (Exception, SystemExit) as error:  # the module's code may raise anything
        return "missing", f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    try:
        parameters = tuple(inspect.signature(getattr(found, "__func__", found)).parameters)
    except (TypeError, ValueError):
        return "changed", f"expected a function, found {type(found).__name__}"
    if isinstance(found, classmethod):
        parameters = parameters[1:]
    versions = [tuple(version.split()) for version in row.parameters.split("|")]
    if not any(parameters[: len(expected)] == expected for expected in versions):
        wanted = " or ".join(f"({', '.join(expected)})" for expected in versions)
        return "changed", f"expected parameters {wanted}, found ({', '.join(parameters)})"
    if row.replacement is None:
        return "ok", "relied upon"
    return "ok", "patched" if row.target in _originals else "not patched"


def stand_in(original: Callable, call: Callable) -> Callable:
    """A function that runs ``call(*args, **kwargs)`` and looks like `original`.

    Name, signature, source, annotations, attributes, pickling by name and ``__wrapped__`` are those of `original`.
    """
    function: Any = lambda *args, **kwargs: call(*args, **kwargs)  # noqa: E731  (one line: a traceback shows the original's)
    if inspect.isfunction(original):
        code = original.__code__
        place = {"co_filename": code.co_filename, "co_firstlineno": code.co_firstlineno, "co_name": code.co_name}
        code = function.__code__.replace(**place)
        function = types.FunctionType(code, original.__globals__, code.co_name, None, function.__closure__)
    functools.update_wrapper(function, original)
    del function.__wrapped__
    vars(function).update(vars(original))
    function.__signature__ = inspect.signature(original)
    return function


def replace(target: str, replacement: Callable, when: Optional[Callable[..., bool]] = None) -> None:
    """Make `target` call ``replacement(original, …)`` where ``when(…)`` is true, else the original.

    The replacement gets a class method bound to its class. A function that the target's module imported from elsewhere
    is replaced in its home module, too: pickling looks for it there.
    """
    owner, name = _owner(target)
    original = inspect.getattr_static(owner, name)
    places = [(owner, name)]
    if isinstance(original, classmethod):

        def bound(call, cls, *args, **kwargs):
            return replacement(functools.partial(call, cls), *args, **kwargs)

        function: Any = classmethod(_stand_in(original.__func__, bound, when))
    elif isinstance(original, staticmethod):
        function = staticmethod(_stand_in(original.__func__, replacement, when))
    else:
        function = _stand_in(original, replacement, when)
        home = sys.modules.get(getattr(original, "__module__", ""))
        if inspect.ismodule(owner) and getattr(home, function.__name__, None) is original:
            places.append((home, function.__name__))
    for place in places:
        setattr(*place, function)
    _originals[target], _places[target] = original, places


@functools.lru_cache(maxsize=None)
def _stand_in(original: Callable, replacement: Callable, when: Optional[Callable[..., bool]]) -> Callable:
    def call(*args, **kwargs):
        if when is None or when(*args, **kwargs):
            return replacement(original, *args, **kwargs)
        return original(*args, **kwargs)

    return stand_in(original, call)


def restore(targets: Optional[Iterable[str]] = None) -> None:
    """Put back the originals of these targets, or all originals."""
    for target in list(_originals if targets is None else targets):
        if target in _originals:
            original = _originals.pop(target)
            for place in _places.pop(target):
                setattr(*place, original)


def is_replaced(path: str) -> bool:
    """Whether a function with this path in its module, such as ``Class.name``, is replaced."""
    return any(target.partition(":")[2] == path for target in _originals)


def folder_of(module: str) -> Optional[str]:
    """Folder of a module's top-level package, or None if that is not imported."""
    package = sys.modules.get(module.partition(".")[0])
    file = getattr(package, "__file__", None)
    return os.path.dirname(file) if file else next(iter(getattr(package, "__path__", ())), None)


def _owner(target: str) -> Tuple[Any, str]:
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name
