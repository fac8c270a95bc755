"""The PyTorch side of the memory benchmark: real workers on small tasks, the searches against fakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgelocal.errors import UsageError
from edgelocal.exporters.bench import torch_side, torch_steps, worker_torch
from edgelocal.exporters.bench.result import Measurement, Setting, combine
from edgelocal.exporters.bench.torch_side import batch_at_peak, best_checkpointing, measure_bp, segment_candidates
from edgelocal.exporters.units import load_network
from edgelocal.storage.decode import decode

MIB = 1 << 20
MLP = Setting("mlp", input="20", classes=4, batch=8, steps=3, threads=1)


def measurement(batch: int = 8, segments: int = 0, working_set: int = MIB) -> Measurement:
    """What a worker could have answered."""
    variant = "checkpoint" if segments else "bp"
    return Measurement(variant, "n", batch, segments, 5, working_set, working_set + 5, (0.2, 0.4), 0.3, 7, (2.0, 1.0))


def silent(text: str) -> None:
    """A `say` for who does not listen."""


def worker(*options: str) -> Measurement:
    """A worker whose tensors are pages of their own: resident memory then follows the live bytes, without the tenths
    by which fragments of the C library's heap let it differ from process to process."""
    line = [sys.executable, "-m", "edgelocal.exporters.bench.worker_torch", *options]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120, env=environment)
    found: Measurement = decode(Measurement, json.loads(done.stdout), "worker")
    return found


def test_checkpointing_trains_alike_in_less_memory() -> None:
    task = ("--network=resnet20", "--batch=64", "--steps=1")
    plain = worker(*task, "--mode=bp")
    less = worker(*task, "--mode=checkpoint", "--segments=5")
    assert less.loss == pytest.approx(plain.loss, rel=1e-6)
    assert plain.loss[0] != plain.loss[1]
    # At least the feature maps after each convolution and each batch norm are kept: 7 of 16 channels on 32x32, 6 of 32
    # on 16x16, 6 of 64 on 8x8.
    maps = 2 * 64 * 4 * (7 * 16 * 32**2 + 6 * 32 * 16**2 + 6 * 64 * 8**2)
    assert maps < plain.working_set_bytes < 2 * maps
    assert less.working_set_bytes < 0.75 * plain.working_set_bytes


def test_a_worker_measures_the_task_it_is_given() -> None:
    found = measure_bp(MLP)
    assert (found.variant, found.network, found.batch, found.segments) == ("bp", "mlp", 8, 0)
    assert found.parameters == sum(p.numel() for p in load_network("mlp", (20,), 4, 0).module.parameters())
    assert len(found.step_s) == 3
    assert found.time_per_sample_s == sorted(found.step_s)[1] / 8
    assert found.process_peak_bytes - found.idle_bytes == found.working_set_bytes
    assert 0 < found.working_set_bytes < 100 * MIB < found.idle_bytes  # PyTorch alone is larger
    assert found.loss == pytest.approx(reference_losses(MLP), rel=1e-6)


def reference_losses(setting: Setting) -> tuple[float, float]:
    """First and last loss of the same training, by the update rule written out."""
    module = load_network(setting.network, (20,), setting.classes, setting.seed).module.train()
    momenta = [torch.zeros_like(p) for p in module.parameters()]
    generator = torch.Generator().manual_seed(setting.seed)
    losses = []
    for _ in range(2 + setting.steps):
        x = torch.randn(setting.batch, 20, generator=generator)
        y = torch.randint(setting.classes, (setting.batch,), generator=generator)
        loss = functional.cross_entropy(module(x), y)
        losses.append(loss.item())
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, momenta, strict=True):
                decayed = g + 1e-4 * p
                m.mul_(0.9).add_(decayed)
                p.sub_(0.01 * (decayed + 0.9 * m))
    return losses[0], losses[-1]


def test_checkpointed_gradients_are_those_of_the_module() -> None:
    network = load_network("resnet20", (3, 8, 8), 10, 0)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parameters = list(network.module.parameters())
    plain = torch.autograd.grad(network.module(x).square().sum(), parameters)
    for segments in (2, 4, 10):
        forward = torch_steps.checkpointed(network, segments)
        for p in parameters:
            p.grad = None
        forward(x).square().sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close([p.grad for p in parameters], list(plain), rtol=1e-5, atol=1e-5)


def test_every_segment_but_the_last_runs_twice() -> None:
    network = load_network("resnet20", (3, 8, 8), 10, 0)
    runs = [0] * len(network.units)

    def count(index: int) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, arguments: object) -> None:
            runs[index] += 1

        return hook

    for index, unit in enumerate(network.units):
        unit.module.register_forward_pre_hook(count(index))
    torch_steps.checkpointed(network, 4)(torch.randn(2, 3, 8, 8)).sum().backward()  # type: ignore[no-untyped-call]
    assert runs == [2] * 7 + [1] * 3


@pytest.mark.parametrize(
    ("units", "segments", "sizes"), [(10, 2, [5, 5]), (10, 4, [2, 2, 3, 3]), (16, 3, [5, 5, 6]), (3, 3, [1, 1, 1])]
)
def test_segments_are_equal_and_the_larger_ones_last(units: int, segments: int, sizes: list[int]) -> None:
    assert torch_steps.segment_sizes(units, segments) == sizes


def test_candidates() -> None:
    assert segment_candidates(1) == ()
    assert segment_candidates(2) == (2,)
    assert segment_candidates(10) == (2, 3, 4, 5, 6, 7, 8, 10)
    assert segment_candidates(100) == (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 19, 20, 21, 100)


def test_the_best_checkpointing_is_that_of_the_medians() -> None:
    asked: list[tuple[int, int]] = []
    # 5 segments look best once, by luck; 4 are.
    sizes = {5: iter((60, 100, 100)), 4: iter((70, 71, 72)), 6: iter((80, 81, 82))}

    def fake(setting: Setting, segments: int) -> Measurement:
        asked.append((setting.steps, segments))
        return measurement(segments=segments, working_set=next(sizes[segments]) if segments in sizes else 500)

    said: list[str] = []
    best = best_checkpointing(Setting("resnet20", steps=50), said.append, fake)
    assert (best.segments, best.working_set_bytes) == (4, 71)
    assert [segments for _, segments in asked] == [2, 3, 4, 5, 6, 7, 8, 10, 5, 5, 4, 4, 6, 6]
    assert {steps for steps, _ in asked} == {torch_side.SEARCH_STEPS}
    assert said[2] == "search for the best checkpointing, 3 of 14: 4 segments, 70 B"
    assert len(said) == len(asked)


@pytest.mark.parametrize("limit", [0, 19, 20, 21, 30, 555, 1269, 1270, 1279, 1280, 5000])
@pytest.mark.parametrize("batch", [2, 3, 127, 128])
def test_the_batch_is_the_largest_that_fits(limit: int, batch: int) -> None:
    asked: list[int] = []

    def fake(setting: Setting) -> Measurement:
        asked.append(setting.batch)
        return measurement(batch=setting.batch, working_set=10 * setting.batch)

    found = batch_at_peak(Setting("resnet20", batch=batch), limit, silent, fake)
    expected = max((b for b in range(2, batch + 1) if 10 * b <= limit), default=None)
    assert (found.batch if found else None) == expected
    assert len(asked) == len(set(asked)) <= 9


def test_rounds_are_combined_by_medians() -> None:
    rounds = [replace(measurement(working_set=w), step_s=s) for w, s in ((30, (0.1, 0.9)), (10, (0.2,)), (20, (0.3,)))]
    found = combine(rounds)
    assert (found.working_set_bytes, found.process_peak_bytes, found.step_s) == (20, 25, (0.1, 0.9, 0.2, 0.3))
    assert found.time_per_sample_s == pytest.approx(0.25 / 8)
    with pytest.raises(AssertionError, match="different variants"):
        combine([measurement(), measurement(segments=2)])


def test_a_failed_worker_is_told_with_what_it_wrote() -> None:
    with pytest.raises(UsageError) as caught:
        torch_side.measure_checkpointed(replace(MLP, batch=16), 99)
    assert "--mode checkpoint --segments 99) on mlp at batch 16 failed with exit code 2: " in str(caught.value)
    assert "--segments is 99, expected 2 to " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 1}, "--batch is 1, expected at least 2"),
        ({"steps": 0}, "--steps is 0, expected at least 1"),
        ({"threads": 0}, "--threads is 0, expected at least 1"),
        ({"device": "tpu"}, "--device is 'tpu', expected one of cpu, cuda"),
        ({"device": "cuda", "precision": "int8"}, "--precision is 'int8', expected one of float32, tf32, bf16"),
        ({"precision": "tf32"}, "--precision tf32 is a matter of GPUs"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, int | str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        worker_torch.measure(replace(MLP, **change), torch_steps.Mode())  # type: ignore[arg-type]


def test_the_mode_goes_with_the_segments(capsys: pytest.CaptureFixture[str]) -> None:
    assert worker_torch.main(["--network=mlp", "--mode=checkpoint"]) == 2
    assert worker_torch.main(["--network=mlp", "--mode=bp", "--segments=3"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "--mode checkpoint with --segments 0" in err
    assert "--mode bp with --segments 3" in err


def test_a_network_of_one_unit_has_no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_side, "count_units", lambda setting: 1)
    with pytest.raises(UsageError, match="mlp has 1 unit"):
        best_checkpointing(MLP, silent)


def test_children_run_as_an_ordinary_program(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "error")
    monkeypatch.setenv("KEPT", "yes")
    environment = dict(torch_side._plain_environment())
    assert environment["KEPT"] == "yes"
    assert not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "PYTHONWARNINGS"} & set(environment)


def test_the_answer_has_the_agreed_keys() -> None:
    assert [field.name for field in fields(Measurement)] == [
        *("variant", "network", "batch", "segments", "idle_bytes", "working_set_bytes", "process_peak_bytes"),
        *("step_s", "time_per_sample_s", "parameters", "loss", "reserved_bytes"),
    ]
