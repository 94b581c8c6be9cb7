"""scripts/benchmark.py at small sizes: its parts run, its sides agree, its figures add up. No timing is judged."""

import json
import sys

import benchmark
import host
import pytest
import torch
from versions import TORCH

from llava_mmfuser.block import sampling as ops


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "WIDTH", 32)
    monkeypatch.setattr(benchmark, "GRID", (4, 4))
    monkeypatch.delitem(ops.IMPLEMENTATIONS, "triton")  # test_sampling_triton.py may have put it into its interpreter


def test_transformers_op_is_the_same_function():
    inputs = benchmark.sampling_inputs(2, (3, 5), torch.float32)
    out = benchmark.transformers_op()(*inputs, (3, 5))
    torch.testing.assert_close(out, ops.deformable_sampling(*inputs, (3, 5)))


def test_replaced_sampling_is_really_used():
    fuser, layers = benchmark.fuser_and_layers(1, torch.float32, (4, 4))
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return benchmark.transformers_op()(*arguments)

    torch.testing.assert_close(benchmark.on(spy, lambda: fuser(layers))(), fuser(layers))
    assert len(calls) == 2, "cross- and self-attention"


def test_rows_compare_with_the_first_side():
    rows = benchmark.bench_op(2, torch.float32, 1, (4, 4))
    assert {row.name for row in rows} >= {benchmark.TRANSFORMERS, "reference", "embedding_bag"}
    for row in rows:
        first = next(other for other in rows if other.part == row.part)
        assert row.ratio == pytest.approx(row.ms / first.ms) and row.ms > 0


@pytest.mark.fp16_cpu
def test_every_type_is_compared_with_float32():
    rows = benchmark.bench_types(1, 1)
    assert [row.name for row in rows] == 2 * list(benchmark.DTYPES)


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 7), reason="the sampling is no operator there")
def test_compiled_fuser_is_compared_with_itself():
    rows = benchmark.bench_compiled(1, torch.float32, 1)
    assert [row.name for row in rows] == ["fuser", "compiled, default"]


def test_peak_memory_counts_what_is_alive_at_once():
    def side():
        first = torch.ones(2**18)  # 1 MiB
        del first
        return torch.ones(2**19) + torch.ones(2**19)  # three of 2 MiB

    assert benchmark.peak_memory(side) == pytest.approx(6, abs=0.01)


def test_line_is_fitted():
    slope, constant, quality = benchmark.fit_line([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert (slope, constant, quality) == (pytest.approx(2), pytest.approx(3), pytest.approx(1))
    assert benchmark.fit_line([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])[2] < 0.99


def test_real_training_step_of_both_sides():
    """What a GPU runs at full size, here with a tiny language model and tower (336 pixels, patches of 14)."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    rows = benchmark.bench_llava(1, torch.float32, 1, sizes)
    assert [row.name for row in rows] == ["mlp2x_gelu", "mmfuser"] and rows[1].memory > 0


def test_command_writes_json_and_names_bad_settings(tmp_path):
    script = host.ROOT / "scripts" / "benchmark.py"
    file = tmp_path / "rows.json"
    host.run([sys.executable, script, "--parts", "op", "--rounds", "1", "--json", file])
    assert {row["part"] for row in json.loads(file.read_text())["rows"]} == {
        "op forward, B=1",
        "op forward + backward, B=1",
    }
    done = host.run([sys.executable, script, "--rounds", "0"], check=False)
    assert done.returncode == 2 and "--rounds 0 is not allowed; use a whole number of at least 1" in done.stdout
