"""`status`: what is installed, what is patched and what will run. It answers whatever is broken."""

import contextlib
import importlib
import re
import sys
import textwrap
import types
from importlib import metadata, util
from typing import Any, Dict, Optional, Tuple

from .patching import applied, folder_of

_BROKEN = (Exception, SystemExit)  # all that an import may raise
_DISTRIBUTIONS = ("llava_mmfuser", "llava", "llava-torch", "torch", "transformers", "deepspeed", "flash-attn", "triton")


def status() -> Dict[str, Any]:
    """What is installed and patched. Imports LLaVA and raises nothing; what LLaVA prints goes to stderr.

    Returns:
        ``active`` (bool: every part that this LLaVA has is patched), ``reason`` (why not, or None), ``parts`` (purpose
        to why it is not patched, or None), ``llava`` (its folder, or None), ``versions`` (package to version or None),
        ``targets`` (list of target, state, detail), ``reasons`` (target to why it is patched, and until when),
        ``implementations`` (device to name).
    """
    found: Dict[str, Any] = {"active": False, "reason": None, "llava": None, "parts": {}, "implementations": {}}
    found.update(targets=[], reasons={}, versions={name: _version_of(name) for name in _DISTRIBUTIONS})
    with contextlib.redirect_stdout(sys.stderr):
        try:
            from . import llava_patch
            from .block.sampling import select_implementation
        except _BROKEN as error:
            found["reason"] = f"{explain(error)}; this is the environment {sys.prefix}"
            return found
        for module, rows in llava_patch.PATCHES.items():
            reason, absent = _import(module)
            if reason is None:
                reason = _too_old(module) or llava_patch.why_unpatched(module)
            found["parts"][llava_patch.PURPOSES[module]] = reason
            if module != llava_patch.NATIVE and (not absent or module == llava_patch.ESSENTIAL):
                found["reason"] = found["reason"] or reason
            for row in rows:
                target = row.target.split(":")[0]
                # A failed import is not tried again: the second one fails for other reasons.
                skip = reason is not None and target.split(".")[0] == module.split(".")[0] and target not in sys.modules
                state, detail = ("missing", str(reason)) if skip else llava_patch.state_of(module, row)
                if (skip and row.host is not None) or _too_old(module):
                    state = "absent"
                found["targets"].append((row.target, state, detail))
                found["reasons"][row.target] = f"{row.reason}; until {row.until}"
        found["active"] = found["reason"] is None
        found["llava"] = folder_of(llava_patch.ESSENTIAL)
        for device in ("cpu", "cuda"):
            try:
                found["implementations"][device] = select_implementation(device)
            except Exception as error:
                found["implementations"][device] = explain(error)
    return found


def _too_old(module: str) -> Optional[str]:
    """Why a module is too old for a fuser, or None; only transformers' own LLaVA can be."""
    from . import llava_patch

    version = str(_version_of("transformers"))
    new = [int(number) for number in re.findall(r"\d+", version)[:2]] >= [4, 57]
    if new or module != llava_patch.NATIVE or applied.get(module) is None:
        return None
    return f"they need transformers 4.57 or newer, and this is {version}"


def explain(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {textwrap.shorten(message, 300) or message[:300]}".rstrip(": ")


def _import(module: str) -> Tuple[Any, bool]:
    """Why a module cannot be imported, or None; and whether its package simply lacks it."""
    try:
        importlib.import_module(module)
    except _BROKEN as error:
        host, absent = module.split(".")[0], getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and absent != host and f"{module}.".startswith(f"{absent}."):
            return f"{folder_of(host)} has no {absent}", True
        hidden = _swallowed(module) if type(error) is ImportError else None
        return f"LLaVA cannot be imported: {explain(hidden or error)}", False
    return None, False


def _swallowed(module: str) -> Optional[BaseException]:
    """The error that LLaVA's ``except: pass`` hid: imports the parts without the `__init__` of the package."""
    from . import llava_patch

    host = module.split(".")[0]
    spec = util.find_spec(host)
    if spec is None or host in sys.modules:
        return None
    before = set(sys.modules)
    sys.modules[host] = types.ModuleType(host)
    sys.modules[host].__path__ = list(spec.submodule_search_locations or ())
    try:
        for part in (module, *llava_patch.SWALLOWED):
            importlib.import_module(part)
    except _BROKEN as error:
        return error
    finally:
        llava_patch.revert()
        for name in set(sys.modules) - before:
            if name.split(".")[0] == host:
                del sys.modules[name]
    return None


def _version_of(distribution: str) -> Any:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    except Exception as error:  # damaged metadata
        return f"unknown ({explain(error)})"
