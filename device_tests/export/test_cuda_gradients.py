"""The benchmark of the gradients' forms, tried on the CPU: every candidate is the gradient, one of them is exported."""

from __future__ import annotations

from dataclasses import replace

import convolution_shapes as shapes
import cuda_gradients as benchmark
import numpy as np
import pytest
import torch

from device_tests.export.helpers import session
from edgelocal.runtime.provider import CPU

TINY = [replace(shape, n=2, channels=4, size=9, out=6) for shape in shapes.SHAPES]


def own(shape: shapes.Shape) -> dict[str, torch.Tensor]:
    """Operands, and PyTorch's gradients in float64."""
    torch.manual_seed(0)
    found = {name: torch.randn(size) for name, size in shapes.operands(shape).items()}
    x, w = (found[name].double().requires_grad_() for name in ("x", "w"))
    y = torch.nn.functional.conv2d(x, w, stride=shape.stride, padding=shape.kernel // 2)
    y.backward(found["dy"].double())
    assert x.grad is not None
    assert w.grad is not None
    return {**found, "weight": w.grad, "input": x.grad}


@pytest.mark.parametrize("gradient", ["weight", "input"])
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_every_candidate_is_the_gradient(shape: shapes.Shape, gradient: str) -> None:
    known = own(shape)
    for form, (forms, _) in benchmark.candidates(shape, gradient).items():
        model = benchmark.graph(shape, gradient, forms)
        found = session(model).run(None, {name: known[name].numpy() for name in shapes.used(gradient)})[0]
        np.testing.assert_allclose(found, known[gradient].numpy(), rtol=1e-4, atol=1e-4, err_msg=form)


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def test_exactly_one_candidate_is_what_is_exported(shape: shapes.Shape) -> None:
    for gradient in ("weight", "input"):
        assert sum(chosen for _, chosen in benchmark.candidates(shape, gradient).values()) == 1


def test_a_trial_on_the_cpu_measures_time_and_no_memory() -> None:
    shape = TINY[0]
    rows = [row for kind in ("weight", "input") for row in benchmark.measure(shape, kind, CPU, rounds=1)]
    assert {row.form for row in rows} == {*benchmark.WEIGHTS, *benchmark.INPUTS, benchmark.PYTORCH}
    assert all(row.seconds > 0 and row.memory_bytes is None for row in rows)
    assert all((row.arena_bytes is None) == (row.form == benchmark.PYTORCH) for row in rows)
    text = benchmark.section(rows, False, "the command")
    assert "what is exported for CUDA" in text
    assert text.count(" * |") == 2


def test_the_simulation_says_that_taps_together_take_more() -> None:
    shape = shapes.SHAPES[0]
    found = {
        name: benchmark.exported(replace(shape, n=4), "weight", name, *given, CPU).arena_bytes or 0
        for name, given in benchmark.candidates(shape, "weight").items()
    }
    assert found["tap, batched"] < found["row, batched"] < found["kernel, batched"]
