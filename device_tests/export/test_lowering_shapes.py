"""Moving, picking, combining and reducing as ONNX, output and gradients against PyTorch's autograd in float64; sums
over places that occur twice; what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from device_tests.export.helpers import Function, Probe, check, lowered, op_types
from edgelocal.exporters.lowering import UnsupportedOperatorError

Shaped = tuple[Callable[[Tensor], Tensor], tuple[int, ...]]
LARGE = torch.ones(2000)
PICKS = torch.tensor([2, 0, 0, 3, -1])

FUNCTIONS: dict[str, Shaped] = {
    # moving
    "flatten": (lambda x: x.flatten(1), (3, 4, 2)),
    "flatten in the middle": (lambda x: x.flatten(1, 2), (3, 4, 2)),
    "permute": (lambda x: x.permute(0, 3, 1, 2), (3, 4, 2)),
    "permute then view": (lambda x: x.permute(0, 2, 1).reshape(x.shape[0], -1), (3, 4)),
    "transpose": (lambda x: x.transpose(1, -1), (3, 4, 2)),
    "reshape by sizes": (lambda x: x.reshape(x.shape[0], 2, 6, x.shape[2]), (12, 5)),
    "batch into rows and back": (lambda x: (x.reshape(-1, 5) * 2).reshape(-1, 3, 5), (3, 5)),
    "batch times a size": (lambda x: x.reshape(x.shape[0] * 3, 5).view(x.shape[0], 3, 5), (3, 5)),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), (6, 4)),
    "squeeze and unsqueeze": (lambda x: x.unsqueeze(1).squeeze(2).unsqueeze(-1), (1, 4)),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 4, -1), (5,)),
    "broadcast to the batch": (lambda x: x + torch.arange(4.0, dtype=x.dtype).expand(x.shape[0], 4), (4,)),
    "repeat": (lambda x: x.repeat(1, 2, 3), (3, 4)),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 1), (3, 4)),
    "tile": (lambda x: x.tile(2), (3, 4)),
    "roll": (lambda x: x.roll(2, 1), (5, 4)),
    "flip": (lambda x: x.flip(1, 2), (3, 4)),
    "contiguous": (lambda x: x.transpose(1, 2).contiguous() * 2, (3, 4)),
    "rot90": (lambda x: torch.rot90(x, 1, (1, 2)), (3, 4)),
    "diagonal": (lambda x: x.tril(), (4, 4)),
    # picking
    "slice": (lambda x: x[:, 1:3], (5, 4)),
    "slice from the end": (lambda x: x[:, -3:-1], (5, 4)),
    "slice of two axes": (lambda x: x[:, :, 1:, :2], (2, 4, 5)),
    "slice with a step": (lambda x: x[:, ::2], (5, 4)),
    "slice with step and start": (lambda x: x[:, 1:6:3, ::2], (7, 4)),
    "select": (lambda x: x[:, 2], (5, 4)),
    "select the last": (lambda x: x[:, :, -1], (5, 4)),
    "index": (lambda x: x[:, PICKS], (4, 3)),
    "index of two axes": (lambda x: x[:, PICKS, PICKS.abs()], (4, 5)),
    "index of inner axes": (lambda x: x[:, :, PICKS[:, None], PICKS.abs()], (2, 4, 5)),
    "index select": (lambda x: x.index_select(2, PICKS.abs()), (3, 4)),
    "gather": (lambda x: x.gather(1, (x > 0).long()), (2, 4)),
    "row of each sample": (lambda x: x[torch.arange(x.shape[0]), x.argmax(1) * 0 + 1], (4,)),
    "write to a slice": (lambda x: _write(x, lambda y: y[:, 1:3].mul_(2)), (5, 4)),
    "write to a strided slice": (lambda x: _write(x, lambda y: y[:, ::2].mul_(2)), (5, 4)),
    "write to a strided slice with start": (lambda x: _write(x, lambda y: y[:, 1:5:2].mul_(2)), (6, 4)),
    "write to a row": (lambda x: _write(x, lambda y: y[:, 2].zero_()), (5, 4)),
    # combining
    "concat": (lambda x: torch.cat([x, x * 2, x.relu()], 1), (3, 4)),
    "stack": (lambda x: torch.stack([x, x * 2], 1), (3, 4)),
    "chunk": (lambda x: _gated(*x.chunk(2, 1)), (6, 4)),
    "uneven split": (lambda x: torch.cat(x.split([1, 2, 3], 1)[::-1], 1) * 2, (6, 4)),
    "split with one part unused": (lambda x: x.split(2, 1)[1], (6, 4)),
    "unbind": (lambda x: _gated(*x.unbind(1)), (2, 4)),
    "residual add": (lambda x: x + x.relu(), (3, 4)),
    "residual add in place": (lambda x: _write(x.relu(), lambda y: y.add_(x)), (3, 4)),
    "matmul": (lambda x: x @ x.transpose(1, 2), (3, 4)),
    "matmul, vector": (lambda x: x @ torch.arange(4.0, dtype=x.dtype), (3, 4)),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), (3, 4)),
    "baddbmm": (lambda x: torch.baddbmm(x, x, x, beta=0.5, alpha=2.0), (4, 4)),
    "einsum": (lambda x: torch.einsum("nij,njk->nik", x, x), (4, 4)),
    "einsum with a trace": (lambda x: torch.einsum("nij,kj->nki", x, torch.ones(2, 5, dtype=x.dtype)), (4, 5)),
    "outer": (lambda x: x.unsqueeze(2) * x.unsqueeze(1), (4,)),
    "distance": (lambda x: ((x.unsqueeze(2) - x.unsqueeze(1)) ** 2).sum(-1), (4, 3)),
    "cross attention of the batch mean": (lambda x: x - x.mean(0, keepdim=True), (4,)),
    # choosing
    "where": (lambda x: torch.where(x > 0.2, x, x * 0.1), (3, 4)),
    "masked fill": (lambda x: x.masked_fill(x < 0, -2.0), (3, 4)),
    "clamp": (lambda x: x.clamp(-0.5, 0.7), (3, 4)),
    "clamp from below": (lambda x: x.clamp(min=0.1), (3, 4)),
    "maximum": (lambda x: torch.maximum(x, x.flip(1)), (3, 4)),
    "minimum": (lambda x: torch.minimum(x, x * 2), (3, 4)),
    # element by element
    "polynomial": (lambda x: 2 * x**3 - x / 3 + 1 - x**2, (3, 4)),
    "root and logarithm": (lambda x: (x**2 + 1).sqrt() + (x**2 + 1).log() + (x**2 + 1).rsqrt(), (3, 4)),
    "exponentials": (lambda x: x.exp() + x.expm1() + (x**2).log1p(), (3, 4)),
    "power of a tensor": (lambda x: (x**2 + 1) ** 1.5 + 2**x, (3, 4)),
    "waves": (lambda x: x.sin() * x.cos(), (3, 4)),
    "absolute": (lambda x: x.abs() * x.sign(), (3, 4)),
    "erf": (lambda x: x.erf(), (3, 4)),
    "rounding": (lambda x: x * x.floor() + x * x.ceil(), (3, 4)),
    "division by a tensor": (lambda x: x / (x**2 + 1), (3, 4)),
    "reciprocal": (lambda x: (x**2 + 1).reciprocal(), (3, 4)),
    "integers and floats": (lambda x: x * (x > 0).long() + (x < 0).to(x.dtype), (3, 4)),
    "lerp": (lambda x: torch.lerp(x, x**2, 0.3), (3, 4)),
    # reducing
    "mean": (lambda x: x.mean(1), (3, 4)),
    "mean of all but the batch": (lambda x: x.mean((1, 2), keepdim=True) * x, (3, 4)),
    "mean of everything": (lambda x: x - x.mean(), (3, 4)),
    "sum": (lambda x: x.sum(-1), (3, 4)),
    "variance": (lambda x: x.var(1), (5, 4)),
    "biased variance": (lambda x: x.var((1, 2), unbiased=False).unsqueeze(1), (5, 4)),
    "deviation": (lambda x: x.std(2), (3, 6)),
    "standardised": (lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1), (6, 4)),
    "largest": (lambda x: x.amax(1), (5, 4)),
    "largest of a row": (lambda x: x.max(2).values, (5, 4)),
    "smallest": (lambda x: x.amin((1, 2)).unsqueeze(1), (5, 4)),
    "norm": (lambda x: x.norm(dim=1), (5, 4)),
    "normalised": (lambda x: functional.normalize(x, dim=1), (5, 4)),
    "cosine": (lambda x: functional.cosine_similarity(x, x.flip(1), dim=2), (5, 4)),
    "logsumexp": (lambda x: x.logsumexp(1), (5, 4)),
    "cumulative sum": (lambda x: x.cumsum(1), (5, 4)),
}


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.sigmoid()


def _write(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    y = x * 1
    change(y)
    return y


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_function(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    check(Function(function), shape)


class Counter(nn.Module):
    """Buffers that are read, changed by assignment and changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.randn(4))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.fixed: Tensor
        self.average: Tensor
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4) -> (N, 4)."""
        self.steps.add_(1)
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x * self.fixed + self.average


def test_buffers_are_read_and_changed() -> None:
    model = check(Counter(), (4,))
    assert {o.name for o in model.graph.output} >= {"new/body.average", "new/body.steps"}
    assert "new/body.fixed" not in {o.name for o in model.graph.output}


class Crowded(nn.Module):
    """Many places of the input read the same few rows, so that their gradients add up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(50, 64))
        self.table = nn.Embedding(50, 64)
        self.register_buffer("picks", torch.randint(0, 50, (200,)))
        self.picks: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) tokens -> (N, 64)."""
        both: Tensor = self.table(x) + self.rows[x] + self.rows[self.picks].mean(0)
        return both.sum(1)


def test_sums_over_repeated_places_are_whole_on_several_threads() -> None:
    """ONNX Runtime's ScatterND adds without a lock: on two threads it loses gradients now and then."""
    graph = lowered(probe := Probe(Crowded(), (200,), (64,), floating=False), (200,), torch.int64)
    assert "ScatterND" not in op_types(graph.model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(graph.model.SerializeToString(), options)
    state = {name: tensor.detach().numpy() for name, tensor in probe.state_dict().items()}
    feeds = {"x": torch.randint(0, 50, (100, 200)).numpy(), **{name: state[name] for name in graph.state}}
    names = ["grad/body.rows", "grad/body.table.weight"]
    first = session.run(names, feeds)
    for _ in range(5):
        for a, b in zip(first, session.run(names, feeds), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (lambda x: x.sort(1).values, (5,), "sort"),
        (lambda x: x + LARGE, (2000,), "register_buffer"),
        (lambda x: x[:, [0, 1], :, [1, 0]].movedim(0, 1), (2, 3, 2), "adjacent"),
        (lambda x: functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), 2), (1, 4, 4), "indices"),
    ],
    ids=["sort", "large constant", "separate indices", "unpooling"],
)
def test_what_has_no_form_is_refused(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], message: str
) -> None:
    outputs = function(torch.randn(2, *shape)).shape[1:]
    with pytest.raises(UnsupportedOperatorError, match=message):
        lowered(Probe(Function(function), shape, outputs, floating=True), shape, torch.float32)
