"""scripts/benchmark.py at small sizes: its parts run, its sides agree, its figures add up. No timing is judged."""

import functools
import json
import sys
from importlib.util import find_spec

import benchmark
import host
import pytest
import sampling_deformops
import torch
from versions import TORCH

from llava_mmfuser.block import sampling as ops
from llava_mmfuser.block.kinds import ATTENTION_KINDS

CASE = benchmark.Case(torch.device("cpu"), torch.float32, **benchmark.TINY)


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    monkeypatch.delitem(ops.IMPLEMENTATIONS, "triton")  # test_sampling_triton.py may have put it into its interpreter


def test_transformers_op_is_the_same_function():
    case = CASE._replace(batch=2, grid=(3, 5))
    inputs = benchmark.sampling_inputs(case)
    out = benchmark.transformers_op()(*inputs, case.grid)
    torch.testing.assert_close(out, ops.deformable_sampling(*inputs, case.grid))


@pytest.mark.skipif(find_spec("deformops") is None, reason="deformops is not installed: it needs Python 3.12")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 4e-5), (torch.bfloat16, 3.2e-2)])
def test_deformops_is_the_same_function(dtype, limit):
    assert sampling_deformops.unavailable(dtype) is None
    case = CASE._replace(batch=2, grid=(3, 7))
    value, offsets, logits = (tensor.detach().to(dtype) for tensor in benchmark.sampling_inputs(case))

    def run(function, kind):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (value, offsets.floor() + 0.25, logits)]
        out = function(*leaves, case.grid)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected = run(functools.partial(ops.deformable_sampling, implementation="reference"), torch.float64)
    for found, wanted in zip(run(sampling_deformops.deformable_sampling, dtype), expected):
        assert found.dtype == dtype and (found.double() - wanted).abs().max() < limit * wanted.abs().max()


def test_deformops_is_left_out_where_it_is_not_and_where_it_would_not_repeat(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(sampling_deformops, "import_module", missing)
    reason = sampling_deformops.unavailable(torch.float32)
    assert reason.endswith("cannot be imported: No module named 'deformops.registry'") and "Python 3.12" in reason
    assert all("deformops" not in row.name for row in benchmark.bench_op(CASE))
    assert sampling_deformops.unavailable(torch.float64).endswith("not float64")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert sampling_deformops.unavailable(torch.float32) == "deformops has no deterministic mode"


def test_replaced_sampling_is_really_used():
    fuser, layers = benchmark.fuser_and_layers(CASE)
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return benchmark.transformers_op()(*arguments)

    torch.testing.assert_close(benchmark.on(spy, lambda: fuser(layers))(), fuser(layers))
    assert len(calls) == 2, "cross- and self-attention"


def test_rows_compare_with_the_first_side():
    rows = benchmark.bench_op(CASE._replace(rounds=2))
    assert {row.name for row in rows} >= {benchmark.TRANSFORMERS, "reference", "embedding_bag"}
    for row in rows:
        first = next(other for other in rows if other.part == row.part)
        assert row.ratio == pytest.approx(row.ms / first.ms) and row.ms > 0


@pytest.mark.fp16_cpu
def test_types_and_kinds_of_attention_are_compared():
    assert [row.name for row in benchmark.bench_types(CASE)] == 2 * list(benchmark.DTYPES)
    assert [row.name for row in benchmark.bench_kinds(CASE)] == 2 * list(ATTENTION_KINDS)


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 7), reason="the sampling is no operator there")
def test_compiled_fuser_is_compared_with_itself():
    assert [row.name for row in benchmark.bench_compiled(CASE)] == ["fuser", "compiled, default"]


def test_peak_memory_counts_what_is_alive_at_once():
    def side():
        first = torch.ones(2**18)  # 1 MiB
        del first
        return torch.ones(2**19) + torch.ones(2**19)  # three of 2 MiB

    assert benchmark.peak_memory(CASE.device, side) == pytest.approx(6, abs=0.01)


def test_vision_path_and_real_training_step_have_both_sides():
    """What a GPU runs at full size, here with a tiny language model and tower (336 pixels, patches of 14)."""
    for bench in (benchmark.bench_vision, benchmark.bench_llava):
        rows = bench(CASE)
        assert [row.name for row in rows] == ["mlp2x_gelu", "mmfuser"] and rows[1].memory > 0


def test_command_writes_json_and_names_bad_settings(tmp_path):
    script = host.ROOT / "scripts" / "benchmark.py"
    file = tmp_path / "rows.json"
    host.run([sys.executable, script, "--parts", "op", "--tiny", "--json", file])
    assert {row["part"] for row in json.loads(file.read_text())["rows"]} == {
        "op forward, B=1",
        "op forward + backward, B=1",
    }
    done = host.run([sys.executable, script, "--rounds", "0"], check=False)
    assert done.returncode == 2 and "--rounds 0 is not allowed; use a whole number of at least 1" in done.stdout
