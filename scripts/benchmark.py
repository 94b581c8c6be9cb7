"""Speed and memory of the fuser against LLaVA without it, both sides in one run: ``python scripts/benchmark.py``.

Every comparison interleaves its sides round by round, so that a noisy machine disturbs all alike; medians, the
middle half of the rounds and ratios of medians are shown. Weights are random, sizes are those of LLaVA-1.5 unless said.
`--targets` compares the ratios with what a GPU should reach.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple
from unittest import mock

import sampling_deformops
import torch
from housekeeping import write
from torch.utils.benchmark import Timer

from llava_mmfuser import MMFuser
from llava_mmfuser.block import deformable
from llava_mmfuser.block import sampling as ops
from llava_mmfuser.block.kinds import ATTENTION_KINDS

LEVELS, POINTS = 4, 4
Side = Callable[[], Any]
TRANSFORMERS = "grid_sample (transformers)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """What is measured: where, on what, how often. `layers` are those of the language model."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    rounds: int = 15
    grid: Tuple[int, int] = (24, 24)
    width: int = 1024
    heads: int = 16
    hidden_size: int = 4096
    layers: int = 32

    @property
    def queries(self) -> int:
        return self.grid[0] * self.grid[1]

    def maps(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)


TINY = dict(rounds=1, batch=1, grid=(2, 2), width=32, heads=2, hidden_size=32, layers=1)


class Row(NamedTuple):
    """One side of a comparison. Times in ms; `spread` is the width of the middle half of the rounds; memory in MiB."""

    part: str
    name: str
    ms: float
    spread: float
    ratio: float  # to the first side: below 1 is faster
    memory: Optional[float] = None
    memory_ratio: Optional[float] = None


def measure(case: Case, part: str, sides: Dict[str, Side], memory: bool = False) -> List[Row]:
    """Time every side once per round, in turn, after one warm-up; the first is what the others are compared with."""
    threads = torch.get_num_threads()
    timers = {name: Timer("side()", globals={"side": side}, num_threads=threads) for name, side in sides.items()}
    times: Dict[str, List[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(case.rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median * 1e3)
    peaks = [peak_memory(case.device, side) if memory else None for side in sides.values()]
    medians, rows = list(map(statistics.median, times.values())), []
    for name, values, median, peak in zip(sides, times.values(), medians, peaks):
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median, median, median)
        share = None if peak is None else peak / peaks[0]
        row = Row(f"{part}, B={case.batch}", name, median, high - low, median / medians[0], peak, share)
        text = f"{row.part:34} {name:34} {median:10.2f} ms  ± {row.spread / 2:8.2f}  x{row.ratio:6.3f}"
        print(text + ("" if peak is None else f"{peak:10.1f} MiB ({share:.2f})"), flush=True)
        rows.append(row)
    return rows


def peak_memory(device: torch.device, side: Callable[[], Any]) -> float:
    """Peak of what PyTorch allocates while `side` runs, above what was there before, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        side()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def sampling_inputs(case: Case) -> List[torch.Tensor]:
    """Value, offsets and logits of the cross-attention, with gradients."""
    shapes = [
        (case.batch, LEVELS * case.queries, case.heads, case.width // case.heads),
        (case.batch, case.queries, case.heads, LEVELS, POINTS, 2),
        (case.batch, case.queries, case.heads, LEVELS, POINTS),
    ]
    scales = (1, 3, 1)
    return [(case.maps(*shape).float() * k).to(case.dtype).requires_grad_() for shape, k in zip(shapes, scales)]


def forward_and_backward(
    case: Case, part: str, sides: Dict[str, Tuple[Side, List[torch.Tensor]]], **others: Side
) -> List[Row]:
    """Forwards, also of the others, then forwards with the gradients of what stands beside each side."""

    def both(call, inputs):
        out = call()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    forward = {**{name: call for name, (call, _) in sides.items()}, **others}
    rows = measure(case, f"{part} forward", {name: torch.no_grad()(call) for name, call in forward.items()})
    backward = {name: partial(both, *side) for name, side in sides.items()}
    return rows + measure(case, f"{part} forward + backward", backward)


def transformers_op() -> Callable:
    """Deformable DETR's pure PyTorch op, `grid_sample` level by level, as transformers has it."""
    from transformers.models.deformable_detr.modeling_deformable_detr import multi_scale_deformable_attention

    def run(value, offsets, logits, grid):
        weights = logits.float().flatten(3).softmax(-1).view_as(logits)
        height, width = grid
        index = torch.arange(height * width, device=offsets.device)
        centre = torch.stack([index % width, torch.div(index, width, rounding_mode="floor")], -1) + 0.5
        size = torch.tensor([width, height], device=offsets.device)
        locations = ((centre.view(1, -1, 1, 1, 1, 2) + offsets.float()) / size).contiguous()
        shapes = torch.tensor([grid] * offsets.shape[3])
        return multi_scale_deformable_attention(value.float(), shapes, locations, weights).to(value.dtype)

    return run


def bench_op(case: Case) -> List[Row]:
    """The sampling op, value already projected: transformers' `grid_sample` per level, ours, and every other."""
    inputs = sampling_inputs(case)
    sides = {TRANSFORMERS: (partial(transformers_op(), *inputs, case.grid), inputs)}
    for name in ops.IMPLEMENTATIONS:
        if ops.unavailable(name, case.device, case.dtype) is None:
            call = partial(ops.deformable_sampling, *inputs, case.grid, implementation=name)
            sides[name] = (call, inputs)
    if sampling_deformops.unavailable(case.dtype) is None:
        sides["deformops"] = (partial(sampling_deformops.deformable_sampling, *inputs, case.grid), inputs)
    return forward_and_backward(case, "op", sides)


def fuser_and_layers(case: Case, **settings: Any):
    """A fuser with opened gates, and feature maps."""
    fuser = MMFuser(case.width, num_heads=case.heads, **settings).to(case.device, case.dtype)
    torch.nn.init.normal_(fuser.cross_gate.scale)
    torch.nn.init.normal_(fuser.self_gate.scale)
    return fuser, [case.maps(case.batch, case.queries, case.width) for _ in range(LEVELS + 1)]


def fusing(fuser: MMFuser, layers: List[torch.Tensor]) -> Tuple[Side, List[torch.Tensor]]:
    return partial(fuser, layers), list(fuser.parameters())


def on(sampling: Callable, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with the sampling of every attention replaced."""

    def run():
        with mock.patch.object(deformable, "deformable_sampling", sampling):
            return call()

    return run


def clip_config(case: Case):
    """CLIP ViT-L/14-336; its blocks have the width of the case."""
    from transformers import CLIPVisionConfig

    sizes = dict(hidden_size=case.width, intermediate_size=4 * case.width, num_attention_heads=case.heads)
    return CLIPVisionConfig(num_hidden_layers=24, image_size=336, patch_size=14, projection_dim=768, **sizes)


def bench_fuser(case: Case) -> List[Row]:
    """The whole block against itself on `grid_sample`, transformers' and ours, and against one ViT-L block."""
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    fuser, layers = fuser_and_layers(case)
    block = CLIPEncoderLayer(clip_config(case)).to(case.device, case.dtype).eval()
    tokens = case.maps(case.batch, case.queries + 1, case.width)
    fuse, parameters = fusing(fuser, layers)
    reference = partial(ops.deformable_sampling, implementation="reference")
    sides = {
        TRANSFORMERS: (on(transformers_op(), fuse), parameters),
        "reference": (on(reference, fuse), parameters),
        "fuser": (fuse, parameters),
    }
    return forward_and_backward(case, "fuser", sides, **{"one ViT-L block": lambda: block(tokens, None, None)[0]})


def bench_types(case: Case) -> List[Row]:
    """The same fuser in every dtype."""
    old = case.device.type == "cpu" and torch.__version__ < "2.2"  # multiplies no matrices in float16
    dtypes = {name: dtype for name, dtype in DTYPES.items() if not (old and name == "float16")}
    sides = {name: fusing(*fuser_and_layers(case._replace(dtype=dtype))) for name, dtype in dtypes.items()}
    return forward_and_backward(case, "types, fuser", sides)


def bench_kinds(case: Case) -> List[Row]:
    """Every kind of attention in the fuser."""
    sides = {kind: fusing(*fuser_and_layers(case, attention=kind)) for kind in ATTENTION_KINDS}
    return forward_and_backward(case, "kinds, fuser", sides)


def bench_compiled(case: Case) -> List[Row]:
    """The fuser under torch.compile, on a GPU also replayed from a CUDA graph."""
    fuser, layers = fuser_and_layers(case)
    sides = {"fuser": torch.no_grad()(partial(fuser, layers))}
    for mode in ("default", "reduce-overhead") if case.device.type == "cuda" else ("default",):
        compiled = torch.compile(fuser, fullgraph=True, mode=mode)
        sides[f"compiled, {mode}"] = torch.no_grad()(partial(compiled, layers))
    return measure(case, "compiled fuser forward", sides)


def vision_paths(case: Case):
    """LLaVA's own vision tower and projector, once with mlp2x_gelu and once with mmfuser, on the same ViT-L/14-336."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_projector.builder import build_vision_projector
    from transformers import CLIPVisionModel

    config = clip_config(case)
    model = CLIPVisionModel(config).to(case.device, case.dtype).eval().requires_grad_(False)
    paths = {}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for kind in ("mlp2x_gelu", "mmfuser"):
            settings = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=case.width, hidden_size=case.hidden_size)
            settings.mm_vision_select_layer, settings.mm_vision_select_feature = -2, "patch"
            tower = CLIPVisionTower(folder, settings, delay_load=True)
            tower.vision_tower, tower.is_loaded = model, True
            projector = build_vision_projector(settings).to(case.device, case.dtype)
            if kind == "mmfuser":
                torch.nn.init.normal_(projector.fuser.cross_gate.scale)
                torch.nn.init.normal_(projector.fuser.self_gate.scale)
            paths[kind] = (tower, projector)
    return paths


def bench_vision(case: Case) -> List[Row]:
    """Tower + projector, forward: time and peak activation memory."""
    images, paths = case.maps(case.batch, 3, 336, 336), vision_paths(case).items()
    sides = {name: torch.no_grad()(lambda path=path: path[1](path[0](images))) for name, path in paths}
    return measure(case, "tower + projector forward", sides, memory=True)


def bench_llava(case: Case) -> List[Row]:
    """A pretraining step of a LLaVA-1.5-7B with random weights; only the projector is trained."""
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM

    sizes = dict(hidden_size=case.hidden_size, intermediate_size=case.hidden_size * 43 // 16)
    heads = dict(num_hidden_layers=case.layers, num_attention_heads=max(case.hidden_size // 128, 2))
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            model = LlavaLlamaForCausalLM(LlavaConfig(vocab_size=32000, max_position_embeddings=4096, **sizes, **heads))
    finally:
        torch.set_default_dtype(torch.float32)
    model.train().requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids = torch.randint(3, 32000, (case.batch, 40), device=case.device)
    ids[:, 1] = -200  # LLaVA's image token
    images, sides = case.maps(case.batch, 3, 336, 336), {}
    for name, (tower, projector) in vision_paths(case).items():
        optimizer = torch.optim.AdamW(projector.parameters(), lr=0.0)

        def step(tower=tower, projector=projector, optimizer=optimizer):
            model.model.vision_tower, model.model.mm_projector = tower, projector
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids.clamp(min=0), images=images).loss.backward()
            optimizer.step()

        sides[name] = step
    return measure(case._replace(rounds=max(case.rounds // 3, 1)), "LLaVA training step", sides, memory=True)


PARTS: Dict[str, Callable[[Case], List[Row]]] = {
    "op": bench_op,
    "fuser": bench_fuser,
    "types": bench_types,
    "kinds": bench_kinds,
    "compiled": bench_compiled,
    "vision": bench_vision,
    "llava": bench_llava,
}
TARGETS = (  # part, side, the other side, the largest ratio that a GPU should show
    ("op forward", "triton", TRANSFORMERS, 1 / 10),
    ("op forward + backward", "triton", TRANSFORMERS, 1 / 6),
    ("fuser forward", "fuser", "one ViT-L block", 1.0),
    ("tower + projector forward", "mmfuser", "mlp2x_gelu", 1.0),
)


def judged(rows: List[Row], gpu: bool) -> List[Tuple[str, Optional[bool], str]]:
    """Every target, whether it is met, and by what; None where it was not measured on a GPU."""
    ms = {(row.part.rsplit(", B=", 1)[0], row.name): row.ms for row in rows}
    found = []
    for part, side, other, limit in TARGETS:
        if (part, side) not in ms or (part, other) not in ms:
            found.append((part, None, "not measured here"))
            continue
        ratio = ms[part, side] / ms[part, other]
        text = f"{side} takes {ratio:.3f} of {other}, at most {limit:.3f}"
        found.append((part, ratio <= limit if gpu else None, text if gpu else f"{text} on a GPU"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="If not given: float32 on the CPU, bfloat16 on a GPU.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of every comparison (default: 15)")
    parser.add_argument("--batch", type=int, help="images at once. If not given: 1 on the CPU, 16 on a GPU.")
    parser.add_argument("--side", type=int, default=24, help="patches on a side of the feature map (default: 24)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="If not given: all, llava only on a GPU.")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--targets", action="store_true", help="print what a GPU should reach; exit code 1 if it fails")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    for name in ("rounds", "side"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not allowed; use a whole number of at least 1")
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bfloat16" if gpu else "float32")]
    case = Case(device, dtype, options.batch or (16 if gpu else 1), options.rounds, (options.side,) * 2)
    if options.tiny:
        case = case._replace(**TINY)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {case.dtype}", flush=True)
    print("medians, ± half the width of the middle half of the rounds, ratio to the first side (memory: the same)")
    torch.manual_seed(0)
    rows: List[Row] = []
    for part in options.parts or [part for part in PARTS if gpu or options.tiny or part != "llava"]:
        rows += PARTS[part](case)
    targets = judged(rows, gpu) if options.targets else []
    words = {True: "pass", False: "FAIL", None: "-"}
    for part, passed, text in targets:
        print(f"{words[passed]:5}{part}: {text}")
    if options.json:
        found = {"machine": machine, "rows": [row._asdict() for row in rows], "targets": targets}
        write(options.json, json.dumps(found, indent=2) + "\n")
    return int(any(passed is False for _, passed, _ in targets))


if __name__ == "__main__":
    sys.exit(main())
