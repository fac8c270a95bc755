"""What the export tests share: a small module lowered and run, a network trained through its step graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgelocal.exporters.forms import CPU, Forms
from edgelocal.exporters.lowering import lower
from edgelocal.exporters.onnx_graph import GraphBuilder, expression, value_info
from edgelocal.exporters.trace import Batch, trace

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime on one thread, without memory pattern, as on the device."""
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def largest(array: Array) -> float:
    """The largest magnitude."""
    return float(np.abs(array).max()) if array.size else 0.0


def relative_errors(found: Arrays, expected: Arrays) -> dict[str, float]:
    """Largest difference over the largest expected value of each tensor.

    A gradient that is 0 but for rounding (a shift in front of a batch norm) is measured by 3 % of the largest one.
    """
    floor = 0.03 * max([largest(a) for name, a in expected.items() if name.startswith("grad/")], default=0.0)
    errors = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = max(largest(value), floor if name.startswith("grad/") else 0.0) or 1.0
        errors[name] = largest(found[name].astype(np.float64) - value) / scale
    return errors


class Probe(nn.Module):
    """(x) -> (loss, output). The loss' gradient differs for every element of the output and every sample.

    The gradients of `scale` and `shift` are sum x dx and sum dx over the batch: with random x, a gradient that reaches
    another element or another sample of x shows.
    """

    def __init__(self, body: nn.Module, shape: Sequence[int], outputs: Sequence[int], floating: bool) -> None:
        super().__init__()
        self.body = body
        self.floating = floating
        self.target: Tensor
        self.register_buffer("target", torch.randn(1, *outputs))
        if floating:
            self.scale = nn.Parameter(1 + 0.1 * torch.randn(1, *shape))
            self.shift = nn.Parameter(0.1 * torch.randn(1, *shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        out = self.body(x * self.scale + self.shift if self.floating else x)
        return ((out + self.target) ** 2).sum() / 2, out.detach()


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.function(x)
        return out


class Given(TorchDispatchMode):
    """Inside, PyTorch's random masks are the given ones, in the order they are asked for."""

    def __init__(self, masks: Sequence[Array]) -> None:
        super().__init__()
        self.left = [torch.from_numpy(m) for m in masks]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the draws, leave everything else."""
        if func in (torch.ops.aten.bernoulli_.float, torch.ops.aten.bernoulli.p, torch.ops.aten.bernoulli.default):
            mask = self.left.pop(0).to(args[0].dtype)
            return args[0].copy_(mask) if func is torch.ops.aten.bernoulli_.float else mask
        return func(*args, **(kwargs or {}))


@dataclass
class Lowered:
    """A probe as an ONNX model, with the names and probabilities of its masks."""

    model: onnx.ModelProto
    outputs: list[str]
    state: list[str]
    masks: list[tuple[str, tuple[int | str, ...], float]]


def lowered(probe: nn.Module, shape: Sequence[int], dtype: torch.dtype, forms: Forms = CPU) -> Lowered:
    """Trace and lower a probe: loss, out, grad/<parameter>, new/<buffer>."""
    batch = Batch()
    traced = trace(probe, (batch.tensor(shape, dtype),), batch, joint=True)
    builder = GraphBuilder(batch_of="x", forms=forms)
    inputs = {traced.user_inputs[0]: "x"}
    inputs |= {place: name for name, place in (traced.parameters | traced.buffers).items()}
    values = lower(traced.graph, builder, inputs)
    results = dict(zip(("loss", "out"), traced.user_outputs, strict=True))
    results |= {f"grad/{name}": node for name, node in traced.gradients.items()}
    results |= {f"new/{name}": node for name, node in traced.new_buffers.items()}
    for name, node in results.items():
        builder.rename(values[node].name, name)
    fakes = {inputs[n.name]: n.meta["val"] for n in traced.graph.nodes if n.op == "placeholder"}
    infos = [value_info(name, dims(fake.shape), fake.dtype) for name, fake in fakes.items()]
    infos += [value_info(m.name, dims(m.shape), torch.bool) for m in builder.masks]
    made = [value_info(name, dims(n.meta["val"].shape), n.meta["val"].dtype) for name, n in results.items()]
    model = builder.model(infos, made, "probe")
    onnx.checker.check_model(model, full_check=True)
    masks = [(m.name, dims(m.shape), m.keep) for m in builder.masks]
    return Lowered(model, list(results), [name for name in fakes if name != "x"], masks)


def dims(shape: Sequence[int | torch.SymInt]) -> tuple[int | str, ...]:
    """A shape as ONNX writes it; what depends on the batch is called by its formula."""
    return tuple(str(expression(d)) if expression(d).free_symbols else int(d) for d in shape)


def check(
    body: nn.Module,
    shape: Sequence[int],
    *,
    batches: Sequence[int] = (5, 1, 3),
    dtype: torch.dtype = torch.float32,
    draw: Callable[[tuple[int, ...]], Tensor] = torch.randn,
    forms: Forms = CPU,
) -> onnx.ModelProto:
    """Output, all gradients and all changed buffers of `body` against eager PyTorch in float64, from one graph.

    The error of each tensor is at most 1e-5; or, where float32 cannot do better (a slope that is saturated, a variance
    of three values), 5 times that of eager PyTorch in float32 and never above 1e-3. The batches are steps: buffers
    changed by one are those of the next. Returns the model.
    """
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # so that no 0 or 1 hides a missing factor
        outputs = copy.deepcopy(body)(draw((2, *shape))).shape[1:]
    probe = Probe(body, shape, outputs, dtype.is_floating_point)
    graph = lowered(probe, shape, dtype, forms)
    state = {name: tensor.detach().numpy() for name, tensor in probe.state_dict().items()}
    reference, single = copy.deepcopy(probe).double(), copy.deepcopy(probe)
    runtime = session(graph.model)
    known = {i.name for i in runtime.get_inputs()}
    for batch in batches:
        x = draw((batch, *shape))
        masks = {name: random_mask(batch, size, keep) for name, size, keep in graph.masks}
        feeds = {"x": x.numpy(), **masks, **{name: state[name] for name in graph.state}}
        found = dict(zip(graph.outputs, runtime.run(None, {k: v for k, v in feeds.items() if k in known}), strict=True))
        expected = eager(reference, x, list(masks.values()), graph.outputs)
        errors = relative_errors(found, expected)
        usual = relative_errors(eager(single, x, list(masks.values()), graph.outputs), expected)
        over = {n: (e, usual[n]) for n, e in errors.items() if not e <= min(max(1e-5, 5 * usual[n]), 1e-3)}
        assert not over, f"batch {batch}: (error, eager float32's) {over}"
        state |= {name.removeprefix("new/"): value for name, value in found.items() if name.startswith("new/")}
    return graph.model


def random_mask(batch: int, size: Sequence[int | str], keep: float) -> Array:
    """A mask as the runner draws it."""
    shape = [batch if isinstance(d, str) else d for d in size]
    return np.random.default_rng(batch).random(shape) < keep


def eager(probe: Probe, x: Tensor, masks: Sequence[Array], names: Sequence[str]) -> Arrays:
    """The same values from PyTorch's autograd in the probe's dtype."""
    probe.zero_grad()
    with given(masks):
        loss, out = probe(x.to(probe.target.dtype) if x.is_floating_point() else x)
    loss.backward()
    result = {"loss": loss.detach().numpy(), "out": out.numpy()}
    for name, parameter in probe.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        result[f"grad/{name}"] = grad.numpy().copy()
    result |= {f"new/{name}": buffer.numpy().copy() for name, buffer in probe.named_buffers()}
    return {name: result[name] for name in names}


@contextmanager
def given(masks: Sequence[Array]) -> Iterator[None]:
    """Draw `masks` instead of random numbers, and see that all were asked for."""
    mode = Given(masks)
    with mode:
        yield
    assert not mode.left, f"{len(mode.left)} masks were not used"


def op_types(model: onnx.ModelProto) -> set[str]:
    """The operators of a model."""
    return {node.op_type for node in model.graph.node}
