"""Speed and memory of the fuser against LLaVA without it, both sides in one run: ``python scripts/benchmark.py``.

Every comparison interleaves its sides round by round, so that a noisy machine disturbs all alike; medians, the
middle half of the rounds and ratios of medians are shown. Weights are random, sizes are those of LLaVA-1.5 unless said.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional
from unittest import mock

import torch
from torch.utils.benchmark import Timer

GRID, LEVELS, HEADS, POINTS, WIDTH, NARROW = (24, 24), 4, 16, 4, 1024, 64
TRANSFORMERS = "grid_sample (transformers)"
PARTS = ("op", "fuser", "types", "compiled", "vision", "step", "growth", "llava")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Row(NamedTuple):
    """One side of a comparison. Times in ms; `spread` is the width of the middle half of the rounds; memory in MiB."""

    part: str
    name: str
    ms: float
    spread: float
    ratio: float  # to the first side: below 1 is faster
    memory: Optional[float] = None
    memory_ratio: Optional[float] = None


def measure(part: str, sides: Dict[str, Callable[[], Any]], rounds: int, memory: bool = False) -> List[Row]:
    """Time every side once per round, in turn, after one warm-up; the first is what the others are compared with."""
    timers = {
        name: Timer("side()", globals={"side": side}, num_threads=torch.get_num_threads())
        for name, side in sides.items()
    }
    times: Dict[str, List[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median * 1e3)
    peaks = {name: peak_memory(side) for name, side in sides.items()} if memory else {}
    first = next(iter(sides))
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median, median, median)
        ratio = median / statistics.median(times[first])
        rows.append(
            Row(part, name, median, high - low, ratio, peaks.get(name), peaks[name] / peaks[first] if peaks else None)
        )
        show(rows[-1])
    return rows


def peak_memory(side: Callable[[], Any]) -> float:
    """Peak of what PyTorch allocates while `side` runs, above what was there before, in MiB."""
    if torch.cuda.is_available() and DEVICE.type == "cuda":
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


def show(row: Row) -> None:
    """One line of the table."""
    memory = "" if row.memory is None else f"{row.memory:10.1f} MiB ({row.memory_ratio:.2f})"
    print(
        f"{row.part:34} {row.name:34} {row.ms:10.2f} ms  ± {row.spread / 2:8.2f}  x{row.ratio:6.3f}{memory}", flush=True
    )


DEVICE = torch.device("cpu")


def sampling_inputs(batch: int, grid: Any, dtype: torch.dtype, levels: int = LEVELS) -> List[torch.Tensor]:
    """Value, offsets and logits of the cross-attention, with gradients."""
    queries = grid[0] * grid[1]
    shapes = [
        (batch, levels * queries, HEADS, WIDTH // HEADS),
        (batch, queries, HEADS, levels, POINTS, 2),
        (batch, queries, HEADS, levels, POINTS),
    ]
    scales = (1, 3, 1)
    return [(torch.randn(s, device=DEVICE) * k).to(dtype).requires_grad_() for s, k in zip(shapes, scales)]


def with_backward(forward: Callable[[], torch.Tensor], parameters: List[torch.Tensor]) -> Callable[[], None]:
    """`forward`, then the gradients of `parameters`."""

    def run():
        out = forward()
        torch.autograd.grad(out, parameters, torch.ones_like(out))

    return run


def without_gradients(forward: Callable[[], Any]) -> Callable[[], Any]:
    """`forward` under `torch.no_grad`."""
    return torch.no_grad()(forward)


def places(offsets: torch.Tensor, grid: Any) -> Dict[str, torch.Tensor]:
    """What ops of Deformable DETR's form take: sizes and first cells of the levels, locations from 0 to 1."""
    queries, levels = offsets.shape[1], offsets.shape[3]
    height, width = grid
    index = torch.arange(queries, device=offsets.device)
    centre = torch.stack([index % width, torch.div(index, width, rounding_mode="floor")], -1) + 0.5
    size = torch.tensor([width, height], device=offsets.device)
    return {
        "shapes": torch.tensor([grid] * levels, device=offsets.device),
        "starts": torch.arange(levels, device=offsets.device) * queries,
        "locations": ((centre.view(1, queries, 1, 1, 1, 2) + offsets.float()) / size).contiguous(),
    }


def compiled_op() -> Optional[Callable]:
    """The authors' hand-compiled CUDA op, float32 inside, where it is installed."""
    try:
        import MultiScaleDeformableAttention as compiled
    except ImportError:
        return None

    def run(value, offsets, logits, grid):
        weights = logits.float().flatten(3).softmax(-1).view_as(logits).contiguous()
        inputs = (value.float(), *places(offsets, grid).values(), weights)
        return compiled.ms_deform_attn_forward(*inputs, value.shape[0]).to(value.dtype)

    return run


def transformers_op() -> Callable:
    """Deformable DETR's pure PyTorch op, `grid_sample` level by level, as transformers has it."""
    from transformers.models.deformable_detr.modeling_deformable_detr import multi_scale_deformable_attention

    def run(value, offsets, logits, grid):
        weights = logits.float().flatten(3).softmax(-1).view_as(logits)
        shapes = torch.tensor([grid] * offsets.shape[3])
        locations = places(offsets, grid)["locations"]
        return multi_scale_deformable_attention(value.float(), shapes, locations, weights).to(value.dtype)

    return run


def bench_op(rounds: int, dtype: torch.dtype, batch: int, grid: Any = GRID) -> List[Row]:
    """(a) the sampling op, value already projected: transformers' `grid_sample` per level, ours, and every other."""
    from llava_mmfuser.block.sampling import IMPLEMENTATIONS, deformable_sampling, unavailable

    inputs = sampling_inputs(batch, grid, dtype)
    calls = {TRANSFORMERS: partial(transformers_op(), *inputs, grid)}
    for name in IMPLEMENTATIONS:
        if unavailable(name, DEVICE, dtype) is None:
            calls[name] = partial(deformable_sampling, *inputs, grid, implementation=name)
    compiled = compiled_op() if DEVICE.type == "cuda" else None
    forward = {name: without_gradients(call) for name, call in calls.items()}
    if compiled:
        forward["compiled CUDA op, forward only"] = without_gradients(lambda: compiled(*inputs, grid))
    rows = measure(f"op forward, B={batch}", forward, rounds)
    both = {name: with_backward(call, inputs) for name, call in calls.items()}
    return rows + measure(f"op forward + backward, B={batch}", both, rounds)


def fuser_and_layers(batch: int, dtype: torch.dtype, grid: Any = GRID):
    """A fuser with opened gates, and feature maps."""
    from llava_mmfuser import MMFuser

    fuser = MMFuser(WIDTH, num_heads=HEADS).to(DEVICE, dtype)
    torch.nn.init.normal_(fuser.cross_gate.scale)
    torch.nn.init.normal_(fuser.self_gate.scale)
    layers = [torch.randn(batch, grid[0] * grid[1], WIDTH, device=DEVICE, dtype=dtype) for _ in range(LEVELS + 1)]
    return fuser, layers


def on(sampling: Callable, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with the sampling of every attention replaced."""
    from llava_mmfuser.block import deformable

    def run():
        with mock.patch.object(deformable, "deformable_sampling", sampling):
            return call()

    return run


def vit_block(dtype: torch.dtype) -> torch.nn.Module:
    """One block of CLIP ViT-L/14-336."""
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    config = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=16)
    return CLIPEncoderLayer(config).to(DEVICE, dtype).eval()


def bench_fuser(rounds: int, dtype: torch.dtype, batch: int) -> List[Row]:
    """(b) the whole block against itself on `grid_sample`, transformers' and ours, and against one ViT-L block."""
    from llava_mmfuser.block import sampling as ops

    fuser, layers = fuser_and_layers(batch, dtype)
    block = vit_block(dtype)
    tokens = torch.randn(batch, GRID[0] * GRID[1] + 1, WIDTH, device=DEVICE, dtype=dtype)
    reference = partial(ops.deformable_sampling, implementation="reference")
    sides = {
        TRANSFORMERS: without_gradients(on(transformers_op(), lambda: fuser(layers))),
        "reference": without_gradients(on(reference, lambda: fuser(layers))),
        "fuser": without_gradients(lambda: fuser(layers)),
        "one ViT-L block": without_gradients(lambda: block(tokens, None, None)[0]),
    }
    rows = measure(f"fuser forward, B={batch}", sides, rounds)
    parameters = list(fuser.parameters())
    sides = {
        TRANSFORMERS: on(transformers_op(), with_backward(lambda: fuser(layers), parameters)),
        "reference": on(reference, with_backward(lambda: fuser(layers), parameters)),
        "fuser": with_backward(lambda: fuser(layers), parameters),
    }
    return rows + measure(f"fuser forward + backward, B={batch}", sides, rounds)


def bench_types(rounds: int, batch: int) -> List[Row]:
    """(b) the same fuser in every dtype."""
    forward, both = {}, {}
    for name, dtype in DTYPES.items():
        if DEVICE.type == "cpu" and dtype == torch.float16 and torch.__version__ < "2.2":
            continue  # multiplies no matrices there
        fuser, layers = fuser_and_layers(batch, dtype)
        call = partial(fuser, layers)
        forward[name], both[name] = without_gradients(call), with_backward(call, list(fuser.parameters()))
    rows = measure(f"types, fuser forward, B={batch}", forward, rounds)
    return rows + measure(f"types, fuser forward + backward, B={batch}", both, rounds)


def bench_compiled(rounds: int, dtype: torch.dtype, batch: int) -> List[Row]:
    """(b) the fuser under torch.compile, on a GPU also replayed from a CUDA graph."""
    fuser, layers = fuser_and_layers(batch, dtype)
    sides = {"fuser": without_gradients(lambda: fuser(layers))}
    for mode in ("default", "reduce-overhead") if DEVICE.type == "cuda" else ("default",):
        compiled = torch.compile(fuser, fullgraph=True, mode=mode)
        sides[f"compiled, {mode}"] = without_gradients(partial(compiled, layers))
    return measure(f"compiled fuser forward, B={batch}", sides, rounds)


def vision_paths(dtype: torch.dtype, hidden_size: int):
    """LLaVA's own vision tower and projector, once with mlp2x_gelu and once with mmfuser, on the same ViT-L/14-336."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_projector.builder import build_vision_projector
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    model = CLIPVisionModel(config).to(DEVICE, dtype).eval().requires_grad_(False)
    paths = {}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for kind in ("mlp2x_gelu", "mmfuser"):
            settings = SimpleNamespace(
                mm_projector_type=kind,
                mm_vision_select_layer=-2,
                mm_vision_select_feature="patch",
                mm_hidden_size=WIDTH,
                hidden_size=hidden_size,
            )
            tower = CLIPVisionTower(folder, settings, delay_load=True)
            tower.vision_tower, tower.is_loaded = model, True
            projector = build_vision_projector(settings).to(DEVICE, dtype)
            if kind == "mmfuser":
                torch.nn.init.normal_(projector.fuser.cross_gate.scale)
                torch.nn.init.normal_(projector.fuser.self_gate.scale)
            paths[kind] = (tower, projector)
    return paths


def bench_vision(rounds: int, dtype: torch.dtype, batch: int, paths: Any) -> List[Row]:
    """(c) tower + projector, forward: time and peak activation memory."""
    images = torch.randn(batch, 3, 336, 336, device=DEVICE, dtype=dtype)
    sides = {
        name: without_gradients(lambda tower=tower, projector=projector: projector(tower(images)))
        for name, (tower, projector) in paths.items()
    }
    return measure(f"tower + projector forward, B={batch}", sides, rounds, memory=True)


def bench_step(rounds: int, dtype: torch.dtype, batch: int, paths: Any) -> List[Row]:
    """(d) a training step of the vision side: tower, projector forward and backward, AdamW."""
    images = torch.randn(batch, 3, 336, 336, device=DEVICE, dtype=dtype)

    def step(tower, projector):
        optimizer = torch.optim.AdamW(projector.parameters(), lr=0.0)

        def run():
            optimizer.zero_grad()
            out = projector(tower(images))
            out.backward(torch.ones_like(out))
            optimizer.step()

        return run

    sides = {name: step(tower, projector) for name, (tower, projector) in paths.items()}
    return measure(f"vision training step, B={batch}", sides, rounds)


def bench_growth(rounds: int, dtype: torch.dtype, batches: List[int], sides: List[int]) -> List[Row]:
    """(e) the fuser's forward against batch size and number of tokens, with a line fitted through each; then each
    attention kind against the number of tokens, with a power fitted."""
    from llava_mmfuser.block.attention import build_attention
    from llava_mmfuser.block.kinds import ATTENTION_KINDS

    rows = []
    for name, cases in (
        ("batch", [(batch, GRID, batch) for batch in batches]),
        ("tokens", [(1, (side, side), side * side) for side in sides]),
    ):
        sizes, times = [], []
        for batch, grid, size in cases:
            fuser, layers = fuser_and_layers(batch, dtype, grid)
            label = f"fuser forward, B={batch}, {grid[0]}x{grid[1]}"
            row = measure(label, {"fuser": without_gradients(partial(fuser, layers))}, rounds)[0]
            rows.append(row)
            sizes.append(float(size))
            times.append(row.ms)
        slope, constant, residual = fit_line(sizes, times)
        print(f"  time = {constant:.2f} ms + {slope:.4f} ms per {name}; R2 = {residual:.4f}", flush=True)
        rows.append(Row(f"growth with {name}", f"R2 of a line, {slope:.5f} ms each", residual, 0.0, 1.0))
    for kind in ATTENTION_KINDS:
        times = []
        for side in sides:
            grid, tokens = (side, side), side * side
            # A narrow map, so that the projections, which every kind has, count little beside the attention itself.
            attention = build_attention(kind, NARROW, LEVELS, 4, num_points=POINTS, window_size=3).to(DEVICE, dtype)
            query = torch.randn(1, tokens, NARROW, device=DEVICE, dtype=dtype)
            value = torch.randn(1, LEVELS * tokens, NARROW, device=DEVICE, dtype=dtype)
            call = {kind: without_gradients(partial(attention, query, value, grid))}
            rows += measure(f"attention, width {NARROW}, {side}x{side}", call, rounds)
            times.append(rows[-1].ms)
        logarithms = [[math.log(number) for number in numbers] for numbers in ([s * s for s in sides], times)]
        exponent, _, residual = fit_line(*logarithms)
        print(f"  {kind}: time ~ tokens^{exponent:.2f}; R2 = {residual:.4f}", flush=True)
        rows.append(Row(f"growth of {kind} with tokens", "exponent of the tokens", exponent, 0.0, 1.0))
    return rows


def fit_line(sizes: List[float], times: List[float]):
    """Least squares: slope, constant and R2."""
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    constant = y.mean() - slope * x.mean()
    residual = 1 - ((y - constant - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return slope.item(), constant.item(), residual.item()


def random_llava(dtype: torch.dtype, batch: int, sizes: Dict[str, int]):
    """A frozen LLaVA with random weights, without vision tower and projector, and the inputs of a pretraining step."""
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig(vocab_size=32000, max_position_embeddings=4096, **sizes)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = LlavaLlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids = torch.randint(3, 32000, (batch, 40), device=DEVICE)
    ids[:, 1] = -200  # LLaVA's image token
    images = torch.randn(batch, 3, 336, 336, device=DEVICE, dtype=dtype)
    return model.train(), dict(input_ids=ids, labels=ids.clamp(min=0), images=images)


def bench_llava(rounds: int, dtype: torch.dtype, batch: int, sizes: Dict[str, int]) -> List[Row]:
    """(d) on a GPU: a pretraining step of a LLaVA-1.5-7B with random weights; only the projector is trained."""
    model, inputs = random_llava(dtype, batch, sizes)
    sides = {}
    for kind, (tower, projector) in vision_paths(dtype, model.config.hidden_size).items():
        optimizer = torch.optim.AdamW(projector.parameters(), lr=0.0)

        def step(tower=tower, projector=projector, optimizer=optimizer):
            model.model.vision_tower, model.model.mm_projector = tower, projector
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()

        sides[kind] = step
    return measure(f"LLaVA training step, B={batch}", sides, rounds, memory=True)


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="If not given: float32 on the CPU, bfloat16 on a GPU.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of every comparison (default: 15)")
    parser.add_argument("--batch", type=int, help="images at once. If not given: 1 on the CPU, 16 on a GPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is not allowed; use a whole number of at least 1")
    DEVICE = torch.device(options.device)
    gpu = DEVICE.type == "cuda"
    dtype = DTYPES[options.dtype or ("bfloat16" if gpu else "float32")]
    batch = options.batch or (16 if gpu else 1)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}", flush=True)
    print("medians, ± half the width of the middle half of the rounds, ratio to the first side (memory: the same)")
    torch.manual_seed(0)
    rows: List[Row] = []
    if "op" in options.parts:
        rows += bench_op(options.rounds, dtype, batch)
    if "fuser" in options.parts:
        rows += bench_fuser(options.rounds, dtype, batch)
    if "types" in options.parts:
        rows += bench_types(options.rounds, batch)
    if "compiled" in options.parts:
        rows += bench_compiled(options.rounds, dtype, batch)
    if {"vision", "step"} & set(options.parts):
        paths = vision_paths(dtype, 4096)
        if "vision" in options.parts:
            rows += bench_vision(options.rounds, dtype, batch, paths)
        if "step" in options.parts:
            rows += bench_step(options.rounds, dtype, batch, paths)
        del paths
    if "growth" in options.parts:
        rows += bench_growth(options.rounds, dtype, [1, 2, 4, 8, 16, 32], [24, 36, 48])
    if "llava" in options.parts and gpu:
        sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        rows += bench_llava(max(options.rounds // 3, 1), dtype, batch, sizes)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump({"machine": machine, "rows": [row._asdict() for row in rows]}, stream, indent=2)


if __name__ == "__main__":
    sys.exit(main())
