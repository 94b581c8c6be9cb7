"""How symbols of another package are checked, replaced and put back. What is replaced: `llava_patch`.

A body runs only where its row's `when` says so. Everywhere else the original is called with the arguments as they came,
so that "absent unless asked for" is a property of `replace`, whatever a host adds to its signatures.
"""

import functools
import importlib
import inspect
import os
import sys
import types
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple


class Patch(NamedTuple):
    """One row."""

    target: str  # module:name, or module:class.name
    replacement: Optional[Callable]  # called with the original first; None where the target is only relied upon
    parameters: str  # that the target must begin with, separated by blanks; of several versions by |
    reason: str
    until: str  # what upstream would have to have for the row to go
    when: Optional[Callable[..., bool]] = None  # of the call's arguments: whether the body runs; None is always
    host: Optional[str] = None  # the LLaVA that has it; another one is patched without the rows of this host


EXPORTED = "exported folders"  # what transformers' own LLaVA is patched for
HOOK_OFF = "the hook is off; call llava_mmfuser.activate()"
# Module of a host -> None, or why its rows were not applied; kept by `apply` of the table that has them.
applied: Dict[str, Optional[str]] = {}
_originals: Dict[str, Any] = {}
# target -> where `replace` wrote its stand-in; a module may have been imported anew since
_places: Dict[str, List[Tuple[Any, str]]] = {}


def check_row(row: Patch) -> Tuple[str, str]:
    """State of a row's target, and what was expected and found. Imports it.

    The state is ``ok``, ``absent`` (another LLaVA has it), ``missing`` or ``changed``.
    """
    try:
        owner, name = _owner(row.target)
        found = _originals.get(row.target) or inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        if row.host is not None and getattr(error, "name", None) == row.target.partition(":")[0]:
            return "absent", f"{row.host} has it"
        return "missing", f"not found ({error})"
    except (Exception, SystemExit) as error:  # of the code of a module that is being imported
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
    """A function that runs ``call(*args, **kwargs)`` and answers as `original` does to whoever looks at it.

    Name, signature, source, annotations, attributes and pickling by name are those of `original`; ``__wrapped__`` is
    there only where `original` has one, and is the same.
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

    The original is bound to the class where it is a class method.

    A function that the target's module has imported is replaced in its own module, too, where pickling looks for it,
    and stays one object under all its names.
    """
    owner, name = _owner(target)
    original = inspect.getattr_static(owner, name)
    places = [(owner, name)]
    if isinstance(original, classmethod):
        call = original.__func__
        function: Any = classmethod(
            stand_in(call, lambda cls, *args, **kwargs: replacement(functools.partial(call, cls), *args, **kwargs))
        )
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
    """Put the originals of these targets back, or all."""
    for target in list(_originals if targets is None else targets):
        if target in _originals:
            original = _originals.pop(target)
            for place in _places.pop(target):
                setattr(*place, original)


def is_replaced(path: str) -> bool:
    """Whether the function at this path in its module, such as ``Class.name``, is replaced in any."""
    return any(target.partition(":")[2] == path for target in _originals)


def folder_of(module: str) -> Optional[str]:
    """Folder of the top-level package of a module, or None where it is not imported."""
    package = sys.modules.get(module.partition(".")[0])
    file = getattr(package, "__file__", None)
    return os.path.dirname(file) if file else next(iter(getattr(package, "__path__", ())), None)


def _owner(target: str) -> Tuple[Any, str]:
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name
