"""Command line: ``python -m llava_mmfuser COMMAND``; ``--help`` lists the commands."""

import argparse
import dataclasses
import os
import re
import runpy
import sys
import traceback
import warnings
from typing import Any, Callable, Dict

from . import activation
from .block.kinds import MAX_LAYERS, check_count
from .config import FLAG_PREFIX, MMFuserConfig
from .layers import LAYER_SETS, Layers


def main() -> int:
    options = _parser().parse_args()
    if options.command == "run":
        return _run(options)  # a traceback is the script's
    return _reporting_errors(options)


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_mmfuser", description="MMFuser for an unmodified LLaVA.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function: Callable, text: str, **settings: Any) -> Callable[..., Any]:
        """Add the command that `function` runs. Returns its `add_argument`."""
        added = commands.add_parser(function.__name__[1:], **{"help": text, "description": text, **settings})
        added.set_defaults(function=function)
        return added.add_argument

    command(_status, "show versions, every patched symbol and which implementation will run", description=None)
    add = command(_run, "run a LLaVA script (path) or module (dotted name) with the hook on", description=None)
    add("target", help="such as llava/train/train_mem.py or llava.serve.cli")
    add("arguments", nargs=argparse.REMAINDER, help="passed on unchanged")

    add = command(_layers, "show which hidden_states indices each named set of layers has in a vision tower")
    add("tower", help="number of blocks, such as 24, or name or folder of a vision tower")
    add("--mm_vision_select_layer", dest="query", type=int, default=-2, help="the query layer. If not given: -2.")

    add = command(_inspect,
                  "show what a checkpoint folder or an adapter file holds and whether it loads (exit code 0 or 1)")
    add("path", help="folder of a checkpoint, adapter or LoRA, or an adapter file")

    convert = command(
        _convert, "rewrite a checkpoint, adapter or LoRA folder of the authors' fork in this package's format, or back")
    upgrade = command(
        _upgrade,
        "put a fresh fuser, which is the identity, in front of a released LLaVA (checkpoint, adapter or LoRA folder)")
    export = command(
        _export,
        "write a checkpoint with a fuser (full, or adapter or LoRA with --base) in transformers' own format")
    for add in (convert, upgrade, export):
        add("input", metavar="IN", help="folder to read; it is never changed")
        add("output", metavar="OUT", help="folder to make; it must not exist")
    for add in (convert, upgrade):
        add("--link", action="store_true",
            help="hard-link weight files that stay as they are. By default they are copied (sharing blocks where the "
                 "file system can), because LLaVA's saving overwrites files in place: training into OUT would then "
                 "damage a linked IN, too.")
    convert("--to", choices=["authors"], help="write the authors' format. If not given: this package's.")
    upgrade("--vision-tower", metavar="PATH",
            help="where to read the tower's config. If not given: mm_vision_tower of IN.")
    kinds: Dict[Any, Dict[str, Any]] = {bool: {"type": _boolean, "nargs": "?", "const": True}, int: {"type": int}}
    for setting in dataclasses.fields(MMFuserConfig):
        kind = kinds.get(setting.type, {})
        upgrade("--" + FLAG_PREFIX + setting.name, help=setting.metadata["help"], **kind)
    export("--to", choices=["llava"],
           help="the way back, from transformers' format. If not given: to transformers' own.")
    export("--base", help="language model of an adapter or LoRA, folder or name on the hub; with --to llava: a folder "
                          "with tokenizer.model, where IN has none")
    export("--vision-tower", metavar="PATH",
           help="with --to llava: the tower that the model was trained with. If not given: what export wrote down.")
    export("--stock", action="store_true", default=None,
           help="write transformers' own LLaVA, which needs no code of ours; possible for linear fusions and shut "
                "gates")

    add = command(
        _visualize,
        "draw the feature maps of pictures, one PNG each: every layer's, the fused one, the difference that the fuser "
        "makes, and where a query samples (exit code 1 if a picture could not be done)",
        help="draw the feature maps of pictures")
    add("--model-path", required=True, metavar="PATH",
        help="folder of a checkpoint, adapter or LoRA, or name on the hub; without a fuser in it (released LLaVA, CLIP "
             "tower) a fresh one is shown, which is the identity")
    add("--image", required=True, nargs="+", action="extend", metavar="X",
        help="file, folder or URL; may be repeated. EXIF orientation is ignored, as in LLaVA.")
    add("--output", required=True, metavar="DIR", help="folder for the PNGs, made if it is absent")
    add("--model-base", metavar="BASE", help="where to look for weights that are not in PATH, as LLaVA's model_base")
    add("--vision-tower", metavar="PATH", help="where to read the tower. If not given: mm_vision_tower of PATH.")
    add("--layers", metavar="LIST",
        help="layers of a model without a fuser, spelled as mm_fuser_layers. If not given: those that a fuser for the "
             "model's own layer would get.")
    add("--at", metavar="X,Y", help="point in pixels of every picture, from its top left corner: show its samples")
    add("--npz", action="store_true",
        help="write the arrays, too: layers [L, H, W, C], fused and difference [H, W, C], indices [L] (hidden_states), "
             "box [4] (left, top, right, bottom of the tower's input in pixels of the picture), real [H, W] (not "
             "padding alone); with --at: at [2], cell [2] (row, column), samples [heads, levels, points, 2] (x, y in "
             "pixels of the picture), weights [heads, levels, points]")
    add("--device", help="If not given: cuda where there is one, else cpu.")
    return parser
# fmt: on


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; use True or False")
    return text.lower() == "true"


def _layers(options: argparse.Namespace) -> None:
    if re.fullmatch(r"[+-]?\d+", options.tower):
        blocks = (int(options.tower[:4000]), 0)  # Python converts at most 4300 digits
        check_count(blocks[0], MAX_LAYERS, "blocks")
    else:
        from .towers import tower_config

        tower = tower_config(options.tower)
        blocks = (tower.num_hidden_layers, tower.num_deleted)
    Layers((options.query,), setting="mm_vision_select_layer").resolve(*blocks)  # refuses a query that does not exist
    for name in LAYER_SETS:
        try:
            layers = str(Layers.parse_listed(name, options.query).resolve(*blocks))
        except ValueError:
            layers = "none below this layer"
        _say(f"{name:8} {layers}")


def _inspect(options: argparse.Namespace) -> bool:
    from .checkpoints.report import NAME_NOTE, inspect

    try:
        lines, reason = inspect(options.path)
    except (ImportError, MemoryError, OSError, RecursionError, ValueError):
        raise
    except Exception as error:  # users inspect what is broken, and need an answer
        from .installation import explain

        lines, reason = [], f"a fault of llava_mmfuser, please report it: {explain(error)}"
    yes = "loads: yes" + (", under such a name" if lines and lines[-1].startswith(NAME_NOTE) else "")
    _say(*lines, yes if reason is None else "loads: no, " + " ".join(reason.split()))
    return reason is not None


def _convert(options: argparse.Namespace) -> None:
    from .checkpoints.convert import convert

    _say(*convert(options.input, options.output, options.to == "authors", options.link))


def _upgrade(options: argparse.Namespace) -> None:
    from .checkpoints.convert import upgrade
    from .checkpoints.files import read_config
    from .export import native
    from .names import is_native

    given = {field.name: getattr(options, FLAG_PREFIX + field.name) for field in dataclasses.fields(MMFuserConfig)}
    settings = {name: value for name, value in given.items() if value is not None}
    if not is_native(read_config(options.input) or {}):
        _say(*upgrade(options.input, options.output, options.link, options.vision_tower, settings))
    elif options.vision_tower:
        raise ValueError("--vision-tower has no effect: the folder holds its vision tower; drop it")
    else:
        _say(*native.upgrade(options.input, options.output, options.link, settings))


def _export(options: argparse.Namespace) -> None:
    from .export.folder import export
    from .export.native import export_to_llava

    if options.to == "llava":
        if options.stock:
            raise ValueError("--stock has no effect with --to llava; drop it")
        _say(*export_to_llava(options.input, options.output, options.base, options.vision_tower))
    elif options.vision_tower:
        raise ValueError("--vision-tower has no effect without --to llava; drop it")
    else:
        _say(*export(options.input, options.output, options.base, options.stock))


def _visualize(options: argparse.Namespace) -> bool:
    from .visualize.command import visualize

    given = {name: getattr(options, name) for name in ("vision_tower", "layers", "device")}
    given.update(path=options.model_path, base=options.model_base)
    failed = False
    for outcome in visualize(options.image, options.output, options.at, options.npz, **given):
        failed |= isinstance(outcome, ValueError)
        _complain("visualize", str(outcome)) if isinstance(outcome, ValueError) else _say(outcome)
    return failed


def _reporting_errors(options: argparse.Namespace) -> int:
    """Run a command. Wrong input and a wrong environment are one line on stderr and exit code 1."""
    warnings.simplefilter("ignore")  # libraries warn about themselves
    try:
        failed = options.function(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe may show only here
        return int(bool(failed))
    except KeyboardInterrupt:
        print(f"python -m llava_mmfuser {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except ValueError as error:
        reason = str(error)
    except ImportError as error:
        reason = f"{error}; this is the environment {sys.prefix}"
    except RecursionError:
        reason = "the input holds something that is nested too deep to be read"
    except (MemoryError, RuntimeError) as error:  # PyTorch has no common type for a lack of memory
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = f"out of memory: {error}"
    _complain(options.command, reason)
    return 1


def _say(*lines: str) -> None:
    for line in lines:
        print(_printable(line))


def _complain(command: str, reason: str) -> None:
    print(_printable(f"python -m llava_mmfuser {command}: error: {' '.join(reason.split())}"), file=sys.stderr)


def _printable(line: str) -> str:
    """The text on one line, with escapes for line ends, control characters and bytes that are no text."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    escaped = "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in line)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _run(options: argparse.Namespace) -> int:
    target = options.target
    activation.activate()
    sys.argv = [target] + options.arguments
    try:
        if not os.path.exists(target):
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        elif os.path.isdir(target) and not os.path.isfile(os.path.join(target, "__main__.py")):
            raise ImportError("the folder has no __main__.py")  # else runpy runs another one on the path
        else:
            if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
                sys.path[0] = os.path.dirname(os.path.abspath(target))
            runpy.run_path(target, run_name="__main__")
    except (ImportError, OSError, ValueError) as error:
        module = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1].f_globals
        if module is not globals() and module.get("__name__") != "runpy":  # the script's own fault
            raise
        _complain("run", f"{target!r} cannot be run as a script or as a module: {error}")
        return 1
    return 0


def _status(options: argparse.Namespace) -> bool:
    from .installation import status
    from .patching import EXPORTED

    found = status()
    parts = found["parts"].items()
    absent = [purpose for purpose, reason in parts if reason is not None and purpose != EXPORTED]
    _say(
        f"active: {', without '.join(['yes', *absent]) if found['active'] else 'no, ' + found['reason']}",
        *(f"  {purpose}: {'yes' if reason is None else f'no, {reason}'}" for purpose, reason in parts),
        f"llava: {found['llava'] or 'not found'}",
        f"automatic hook: {'off (' + activation.DISABLE + ' is set)' if activation.disabled() else 'on'}",
        "versions:",
        *(f"  {name}: {version or 'not installed'}" for name, version in found["versions"].items()),
        "patch targets:",
    )
    for target, state, detail in found["targets"]:
        _say(f"  {state:8}{target}  ({detail})", f"          {found['reasons'][target]}")
    _say("sampling:", *(f"  {device}: {name}" for device, name in found["implementations"].items()))
    return not found["active"]


if __name__ == "__main__":
    sys.exit(main())
