"""Whether this machine's GPU runs the fuser right and fast: ``bash scripts/gpu_check.sh``.

Ends with a table of what passed and a JSON to attach to an issue. Without a GPU it runs through at tiny sizes on the
CPU, the kernels in Triton's interpreter, which says nothing about a GPU but that this script works.
"""

import argparse
import functools
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import benchmark
import torch
from housekeeping import free_port, padded, write

from llava_mmfuser.block import sampling as ops
from llava_mmfuser.block import sampling_triton as kernels

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Result(NamedTuple):
    """One line of the table; `passed` is None where there was nothing to judge, and `detail` says why."""

    name: str
    passed: Optional[bool]
    detail: str


class Size(NamedTuple):
    """How much to do."""

    rounds: int
    batch: int
    width: int
    heads: int
    grid: Tuple[int, int]
    llama: Dict[str, int]
    compiled: Tuple[Tuple[int, torch.dtype, int, int], ...]  # compute capability, dtype, levels, channels per head
    tests: Tuple[str, ...]  # arguments of pytest


SIZES = {
    "full": Size(
        rounds=15,
        batch=16,
        width=1024,
        heads=16,
        grid=(24, 24),
        llama=dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        compiled=tuple(
            (capability, dtype, levels, depth)
            for capability in (80, 90)
            for dtype in (torch.bfloat16, torch.float32)
            for levels, depth in ((4, 64), (1, 64), (4, 72))
        ),
        tests=(),
    ),
    "tiny": Size(
        rounds=1,
        batch=1,
        width=32,
        heads=2,
        grid=(2, 2),
        llama=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        compiled=((80, torch.bfloat16, 1, 64),),
        tests=("-k", "test_output_and_gradients_equal_the_reference and one and cell"),
    ),
}


def environment(size: Size) -> Iterator[Result]:
    """What is installed, and whether the kernels can run at all."""
    device = f"{platform.processor() or platform.machine()} CPU"
    if GPU:
        gpu = torch.cuda.get_device_properties(0)
        device = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    triton = f"triton {getattr(kernels.triton, '__version__', 'none')}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {triton}"
    yield Result("environment", None, f"{device}; {versions}")
    for dtype in DTYPES if GPU else DTYPES[-1:]:
        reason = ops.unavailable("triton", benchmark.DEVICE, dtype)
        if reason is None and GPU:
            reason = ops.try_triton(benchmark.DEVICE, dtype, False)
        chosen = ops.select_implementation(benchmark.DEVICE, dtype)
        yield Result(
            f"kernels' own check, {str(dtype)[len('torch.') :]}",
            None if reason and not GPU else reason is None,
            f"{reason or 'they agree'}; what runs here is {chosen}",
        )


def tests(size: Size, *before: str) -> Iterator[Result]:
    """The kernels' tests on this device: all dtypes, backward, deterministic, odd and large shapes, CUDA graphs."""
    options = ["-q", "-p", "no:cacheprovider", "-rf", *size.tests]
    command = [sys.executable, "-m", "pytest", *options, "tests/block/test_sampling_triton.py"]
    done = subprocess.run([*before, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout[-6000:], flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    yield Result(" ".join(["tests", *map(os.path.basename, before[:1])]), done.returncode == 0, last)


def sanitizer(size: Size) -> Iterator[Result]:
    """The tests of bounds under compute-sanitizer, where it is installed."""
    found = shutil.which("compute-sanitizer")
    if not (GPU and found):
        yield Result("compute-sanitizer", None, "is not installed" if GPU else "needs a GPU")
        return
    size = size._replace(tests=("-k", "out_of_bounds or empty or (odd and width)"))
    yield from tests(size, found, "--tool", "memcheck", "--error-exitcode", "3", "--target-processes", "all")


def definition(size: Size) -> Iterator[Result]:
    """The whole fuser on the kernels against itself on the definition in float32, output and gradients."""
    for dtype in DTYPES if GPU else DTYPES[-1:]:
        name = f"fuser against the definition, {str(dtype)[len('torch.') :]}"
        reason = ops.unavailable("triton", benchmark.DEVICE, dtype)
        if reason:
            yield Result(name, False if GPU else None, reason)
            continue
        fuser, layers = benchmark.fuser_and_layers(min(2, size.batch), dtype, size.grid)
        for attention in (fuser.cross_attn, fuser.self_attn):  # off the integers, where the bilinear kernel has kinks
            attention.sampling_offsets.bias.data += 3 / 8
        parameters, results = list(fuser.parameters()), []
        cotangent = torch.randn_like(layers[-1])
        for implementation in ("triton", "reference"):
            run = functools.partial(ops.deformable_sampling, implementation=implementation)
            out = benchmark.on(run, lambda fuser=fuser, layers=layers: fuser(layers))()
            results.append([out, *torch.autograd.grad(out, parameters, cotangent)])
        deviation = max(
            ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
            for found, expected in zip(*([tensor.double() for tensor in result] for result in results))
        )
        # Two layers of attention, their projections and sums of gradients over all queries in dtype.
        limit = 8 * ops.TOLERANCE[dtype]
        yield Result(name, deviation <= limit, f"deviates by {deviation:.1e} of the largest, at most {limit:.1e}")


def launches(size: Size) -> Iterator[Result]:
    """Kernels that one forward of one image launches."""
    fuser, layers = benchmark.fuser_and_layers(1, torch.bfloat16 if GPU else torch.float32, size.grid)
    with torch.no_grad():
        fuser(layers)
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
        with torch.profiler.profile(activities=kinds) as profile:
            fuser(layers)
    events = profile.key_averages()
    if GPU:
        count = sum(event.count for event in events if "LaunchKernel" in event.key)
        yield Result("launches per forward", count <= 25, f"{count}, at most 25")
    else:
        count = sum(event.count for event in events if event.key.startswith("aten::"))
        yield Result("launches per forward", None, f"needs a GPU ({count} operations of ATen here)")


def speed(size: Size) -> Iterator[Result]:
    """scripts/benchmark.py's comparisons against their targets; a training step of LLaVA-1.5-7B with random weights."""
    dtype, batch = (torch.bfloat16 if GPU else torch.float32), size.batch
    rows = benchmark.bench_op(size.rounds, dtype, batch, size.grid)
    rows += benchmark.bench_fuser(size.rounds, dtype, batch)
    if GPU:  # one image, where launches count most
        rows += benchmark.bench_compiled(size.rounds, dtype, 1)
    paths = benchmark.vision_paths(dtype, size.llama["hidden_size"])
    rows += benchmark.bench_vision(size.rounds, dtype, batch, paths)
    del paths
    if size is SIZES["tiny"] or GPU:
        rows += benchmark.bench_llava(max(size.rounds // 3, 1), dtype, batch, size.llama)
    ROWS.extend(rows)
    ms = {(row.part.rsplit(", B=", 1)[0], row.name): row for row in rows}
    targets = [
        ("op forward", "triton", benchmark.TRANSFORMERS, 1 / 10),
        ("op forward + backward", "triton", benchmark.TRANSFORMERS, 1 / 6),
        ("fuser forward", "fuser", "one ViT-L block", 1.0),
        ("tower + projector forward", "mmfuser", "mlp2x_gelu", 1.0),
        ("LLaVA training step", "mmfuser", "mlp2x_gelu", None),
    ]
    for part, side, other, limit in targets:
        row, first = ms.get((part, side)), ms.get((part, other))
        if row is None or first is None:
            yield Result(part, None, "not measured here")
            continue
        ratio = row.ms / first.ms
        detail = f"{row.ms:.2f} ms, {ratio:.3f} of {other}" + ("" if limit is None else f", at most {limit:.3f}")
        if row.memory is not None:
            detail += f"; {row.memory:.0f} MiB, {row.memory / max(first.memory, 1e-9):.2f} of it"
        yield Result(part, ratio <= limit if GPU and limit is not None else None, detail)


def zero2(size: Size) -> Iterator[Result]:
    """The same training step of LLaVA-1.5-7B under DeepSpeed's ZeRO-2, one process per GPU."""
    count = torch.cuda.device_count() if GPU else 2
    lacking = "several GPUs" if count < 2 else None if find_spec("deepspeed") else "deepspeed"
    if not GPU and tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 2):
        lacking = "a GPU, or torch 2.2, whose gloo knows bfloat16"
    if lacking:
        yield Result("ZeRO-2", None, f"needs {lacking}")
        return
    gc.collect()
    torch.cuda.empty_cache()  # the first process below goes to a GPU that this one has used
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        torch.multiprocessing.spawn(zero2_rank, (count, free_port(), size, file), nprocs=count)
        rows = [benchmark.Row(*row) for row in json.loads(file.read_text())]
    ROWS.extend(rows)
    fused = rows[1]
    for row in rows:
        benchmark.show(row)
    detail = f"{count} processes, {fused.ms:.0f} ms, {fused.ratio:.3f} of mlp2x_gelu; {fused.memory:.0f} MiB"
    yield Result("ZeRO-2", True, f"{detail}, weights trained, and equal on all")


def zero2_rank(rank: int, count: int, port: int, size: Size, file: Path) -> None:
    """One process of `zero2`; the first writes its rows to `file`."""
    sys.stdout = open(os.devnull, "w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not GPU:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not GPU:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
    use_sizes(size, torch.device("cuda", rank) if GPU else torch.device("cpu"))
    torch.manual_seed(0)  # the same weights everywhere, and other pictures
    dtype = torch.bfloat16
    paths = benchmark.vision_paths(dtype, size.llama["hidden_size"])
    model, inputs = benchmark.random_llava(dtype, size.batch, size.llama)
    torch.manual_seed(rank)
    inputs["images"].normal_()
    rows: List[benchmark.Row] = []
    for kind, (tower, projector) in paths.items():
        model.model.vision_tower, model.model.mm_projector = tower, projector.requires_grad_()
        config = {
            "train_micro_batch_size_per_gpu": size.batch,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        before = [parameter.clone() for parameter in projector.parameters()]

        def step(engine=engine):
            engine.backward(engine(**inputs).loss)
            engine.step()

        rows += benchmark.measure(f"ZeRO-2 training step, B={size.batch}", {kind: step}, max(size.rounds // 3, 1), True)
        for name, parameter in projector.named_parameters():
            others = [torch.empty_like(parameter) for _ in range(count)]
            torch.distributed.all_gather(others, parameter.detach())
            if not all(torch.equal(parameter, other) and parameter.isfinite().all() for other in others):
                raise RuntimeError(f"under ZeRO-2 {name} of {kind} is not the same, and finite, on all ranks")
        moved = sum(not torch.equal(*pair) for pair in zip(before, projector.parameters()))
        if moved < len(before) / 2:
            raise RuntimeError(f"under ZeRO-2 only {moved} of {len(before)} tensors of {kind} were trained")
        engine.destroy()
    if rank == 0:
        plain, fused = rows
        ratios = dict(ratio=fused.ms / plain.ms, memory_ratio=fused.memory / max(plain.memory, 1e-9))
        write(file, json.dumps([plain, fused._replace(**ratios)]))


ROWS: List[benchmark.Row] = []
# TB/s out of memory, TB/s out of all L1 caches (128 bytes per clock and multiprocessor), TFLOP/s in float32 and bf16.
DEVICES = {"A100": (2.04, 19.5, 19.5, 312), "H100": (3.35, 29.7, 66.9, 989), "H200": (4.8, 29.7, 66.9, 989)}
MULTIPROCESSOR = {80: 164, 90: 228}  # KiB of shared memory; both have 65536 registers, 64 warps and 32 blocks


def arithmetic(size: Size) -> Iterator[Result]:
    """What the kernels have to move and to compute, and what the compiler makes of them; needs no GPU."""
    bounds()
    version = getattr(kernels.triton, "__version__", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 3):
        yield Result("compiled kernels", None, f"needs triton 3.3, and this is {version}")
        return
    if not isinstance(kernels._forward_kernel, kernels.triton.JITFunction):  # interpreted; another process compiles
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        name = next(name for name in SIZES if SIZES[name] is size)
        command = [sys.executable, str(Path(__file__)), "--parts", "arithmetic", "--size", name]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            subprocess.run([*command, "--json", str(file)], env=env, stdout=subprocess.DEVNULL, check=False)
            found = json.loads(file.read_text())
        COMPILED.extend(found["compiled"])
        yield from (Result(*result) for result in found["results"])
        return
    for capability, dtype, levels, depth in size.compiled:
        for deterministic in (False, True):
            for kernel, tensors, constants in recorded_launches(dtype, levels, depth, deterministic):
                case = dict(kernel=kernel.__name__, sm=capability, dtype=str(dtype)[6:], levels=levels, depth=depth)
                row = {**case, **compiled(kernel, tensors, dict(constants), capability)}
                if row not in COMPILED:
                    COMPILED.append(row)
    worst = max(row["stack"] for row in COMPILED)
    fewest = min(row["warps/SM"] for row in COMPILED)
    yield Result("compiled kernels", worst <= 64, f"at most {worst} bytes of stack, at least {fewest} warps at once")


COMPILED: List[Dict[str, Any]] = []


def bounds() -> None:
    """Print what 16 images of LLaVA-1.5 move and compute, and the least time that takes."""
    batch, queries, heads, points, depth = 16, 576, 16, 4, 64
    table = [("B=16, bf16", "MB", "gather MB", "atomics MB", "GFLOP", *(f"{name} us" for name in DEVICES))]
    for levels in (4, 1):
        samples = batch * queries * heads * levels * points
        value, inputs, out = batch * levels * queries * heads * depth, 3 * samples, batch * queries * heads * depth
        corners = 4 * samples * depth
        # name, bytes that must come from memory once, bytes of gathers, of atomics, floating-point operations
        cases = [
            ("forward", 2 * (value + inputs + out), 2 * corners, 0, 2 * corners),
            ("backward", 2 * (value + 2 * inputs + out) + (4 + 4 + 2) * value, 2 * corners, 4 * corners, 5 * corners),
            (
                "grad_value, deterministic",
                2 * (inputs + out) + (4 + 2) * value,
                0,
                0,
                batch * heads * levels * queries**2 * (2 * depth + 10 * points),
            ),
        ]
        for name, memory, gathers, atomics, operations in cases:
            times = (
                max(memory / rate, (gathers + atomics) / cache, operations / plain) / 1e6
                for rate, cache, plain, _ in DEVICES.values()
            )
            counts = (memory / 1e6, gathers / 1e6, atomics / 1e6, operations / 1e9)
            table.append((f"{name}, L={levels}", *(f"{number:.1f}" for number in counts), *(f"{t:.0f}" for t in times)))
    for name, operations in (("fuser, matrix products", 9.68e9), ("one ViT-L block", 15.88e9)):
        times = (f"{batch * operations / matrix / 1e6:.0f}" for *_, matrix in DEVICES.values())
        table.append((name, "", "", "", f"{batch * operations / 1e9:.1f}", *times))
    print("\n".join(padded(table)), flush=True)


def recorded_launches(dtype: torch.dtype, levels: int, depth: int, deterministic: bool) -> List[Tuple[Any, ...]]:
    """(kernel, tensors, constants) of a forward and backward of LLaVA-1.5's shapes, not launched."""
    found: List[Tuple[Any, ...]] = []
    shapes = (16, levels * 576, 16, depth), (16, 576, 16, levels, 4, 2), (16, 576, 16, levels, 4)
    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]

    def record(kernel, programs, tensors, **constants):
        found.append((kernel, tensors, constants))

    with mock.patch.object(kernels, "_launch", record):
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: deterministic):
            out = kernels._forward(*inputs, (24, 24))
            kernels._gradients((True, True, True), torch.empty_like(out), *inputs, (24, 24))
    return found


def compiled(kernel: Any, tensors: Any, constants: Dict[str, Any], capability: int) -> Dict[str, int]:
    """Registers, stack (spills) and shared memory of a kernel for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    warps = constants.pop("num_warps")
    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    pointers = [kinds[tensor.dtype] for tensor in tensors]
    rest = ["constexpr"] * (len(kernel.arg_names) - len(pointers))
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, pointers + rest)), constants, aligned)
    options = dict(num_warps=warps, num_stages=1)
    binary = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    per_warp = -(-registers * 32 // 256) * 256
    at_once = min(64, 4 * (16384 // per_warp)) // warps  # four schedulers of 16384 registers
    blocks = min(32, at_once, MULTIPROCESSOR[capability] * 1024 // (binary.metadata.shared + 1024))
    found = {"warps": warps, "registers": registers, "stack": stack, "shared": binary.metadata.shared}
    return {**found, "warps/SM": blocks * warps}


PARTS: Dict[str, Callable[[Size], Iterator[Result]]] = {
    "environment": environment,
    "tests": tests,
    "sanitizer": sanitizer,
    "definition": definition,
    "launches": launches,
    "speed": speed,
    "zero2": zero2,
    "arithmetic": arithmetic,
}


def use_sizes(size: Size, device: torch.device) -> None:
    benchmark.DEVICE = device
    benchmark.WIDTH, benchmark.HEADS, benchmark.GRID = size.width, size.heads, size.grid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do (default: all)")
    parser.add_argument("--size", choices=SIZES, help="If not given: full on a GPU, tiny on the CPU.")
    parser.add_argument("--json", metavar="FILE", default="gpu_check.json", help="default: gpu_check.json")
    options = parser.parse_args()
    size = SIZES[options.size or ("full" if GPU else "tiny")]
    use_sizes(size, torch.device("cuda", 0) if GPU else torch.device("cpu"))
    torch.manual_seed(0)
    results: List[Result] = []
    for part in options.parts:
        print(f"== {part}", flush=True)
        start = time.monotonic()
        try:
            results += PARTS[part](size)
        except Exception as error:  # one part's failure is a line of the table, and the others go on
            traceback.print_exc()
            results.append(Result(part, False, f"{type(error).__name__}: {error}"))
        print(f"   {time.monotonic() - start:.0f} s", flush=True)
    if COMPILED:
        print("\n".join(padded([list(COMPILED[0]), *([str(cell) for cell in row.values()] for row in COMPILED)])))
    words = {True: "pass", False: "FAIL", None: "-"}
    print("\n".join(padded([(result.name, words[result.passed]) for result in results])), "\n", sep="")
    for result in results:
        print(f"{words[result.passed]:5}{result.name}: {result.detail}")
    if not GPU:
        print("No GPU was found: this ran on the CPU and judges no GPU.")
    found = {
        "results": [list(result) for result in results],
        "rows": [row._asdict() for row in ROWS],
        "compiled": COMPILED,
    }
    write(Path(options.json), json.dumps(found, indent=2) + "\n")
    print(f"Attach {options.json} to an issue.")
    return int(any(result.passed is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
