"""The forms of a convolution's gradients, each alone: time and device memory, beside PyTorch's own.

    python benchmarks/cuda_gradients.py --device cuda [--tf32] [--rounds 20] [--shapes 1,5] [--json] [--write]

Ten shapes of ResNet-32, -110 and -50. Every form is a graph of its own, run as training runs it, in turn with the
others and PyTorch's aten::convolution_backward; the median round counts, with the end of the device's work awaited.
`memory` is what a run takes of the device beside inputs and result: what the arena grew by, or PyTorch's allocator at
its peak; `arena` is what the exporter's simulation says, without the libraries' workspaces. TF32 is off in both unless
it is asked for. A star marks what `exporters/forms.py` has for CUDA. `--device cpu` is a trial of this program and no
measurement: memory is not measured. Never run on a GPU so far (docs/decisions/0016).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import cuda_result
import numpy as np
import onnx
import torch
from convolution_shapes import SHAPES, Shape, operands, used
from on_device import make_provider

from edgelocal.exporters.forms import CUDA, Forms
from edgelocal.exporters.lowering.convolution import input_gradient
from edgelocal.exporters.lowering.weight_gradient import Geometry, weight_gradient
from edgelocal.exporters.memory.liveness import graph_of
from edgelocal.exporters.memory.model import scratch
from edgelocal.exporters.memory.shapes import value_types
from edgelocal.exporters.memory.simulate import arena_peak
from edgelocal.exporters.onnx_graph import GraphBuilder, Value, value_info
from edgelocal.machine.gpu_memory import device_memory
from edgelocal.runtime.arena import releasing
from edgelocal.runtime.provider import CPU, Provider

BATCHED, MERGED = 1 << 30, 0
PYTORCH = "PyTorch"
WARM_UPS = 3  # the second run of a shape may plan its memory, the first chooses kernels


WEIGHTS = {
    f"{stack}, {name}": replace(CUDA, weight="products", stack=stack, merge_from=pairs)
    for stack in ("tap", "row", "kernel")
    for name, pairs in (("batched", BATCHED), ("merged", MERGED))
} | {"convolution": replace(CUDA, weight="convolution")}
INPUTS = {kind: replace(CUDA, input=kind) for kind in ("flipped", "transposed")}  # type: ignore[arg-type]  # both are one


@dataclass(frozen=True)
class Row:
    """A form of a gradient ("weight" or "input") of a shape: median seconds of a run, bytes of the device (None: not
    measured), bytes of the arena by simulation (None: PyTorch)."""

    shape: str
    gradient: str
    form: str
    chosen: bool
    seconds: float
    memory_bytes: int | None
    arena_bytes: int | None


@dataclass(frozen=True)
class Program:
    """Something that can be run again and again, and what a run takes of the device."""

    form: str
    chosen: bool
    run: Callable[[], None]
    memory: Callable[[], int | None]
    arena_bytes: int | None


def candidates(shape: Shape, gradient: str) -> dict[str, tuple[Forms, bool]]:
    """The forms that differ for a shape, and whether each is the one that is exported for CUDA."""
    if gradient == "input":
        given = INPUTS if shape.stride == 1 else {"transposed": CUDA}
        return {name: (forms, forms.input == CUDA.input or shape.stride > 1) for name, forms in given.items()}
    pairs = shape.channels * shape.out

    def chosen(forms: Forms) -> bool:
        same = forms.weight == CUDA.weight and (pairs >= forms.merge_from) == (pairs >= CUDA.merge_from)
        return same and (shape.kernel == 1 or forms.stack == CUDA.stack)

    several = shape.kernel > 1  # or there is but one tap
    return {name: (f, chosen(f)) for name, f in WEIGHTS.items() if several or not name.startswith(("row", "kernel"))}


def graph(shape: Shape, gradient: str, forms: Forms) -> onnx.ModelProto:
    """The gradient alone: x, w, dy -> dx or dw, all of fixed sizes."""
    b = GraphBuilder(batch_of="", forms=forms)
    sizes = operands(shape)
    x, w, dy = (Value(name, sizes[name], torch.float32) for name in ("x", "w", "dy"))
    pad = (shape.kernel // 2,) * 2
    g = Geometry((shape.stride,) * 2, pad, (1, 1), 1)
    made = weight_gradient(b, x, dy, w, g) if gradient == "weight" else input_gradient(b, dy, x, w, g)
    b.rename(made, "result")
    read = used(gradient)
    return b.model(
        [value_info(name, sizes[name], torch.float32) for name in read],
        [value_info("result", sizes["w" if gradient == "weight" else "x"], torch.float32)],
        gradient,
    )


def exported(shape: Shape, gradient: str, form: str, forms: Forms, chosen: bool, device: Provider) -> Program:
    """A form in ONNX Runtime."""
    model = graph(shape, gradient, forms)
    arena = arena_peak(graph_of(model, value_types(model)), shape.n, scratch)
    session = device.session(model.SerializeToString(), torch.get_num_threads(), shape.n)
    rng, binding = np.random.default_rng(0), session.io_binding()
    sizes = operands(shape)
    tensors = [device.place.of(rng.standard_normal(sizes[name], np.float32)) for name in used(gradient)]
    result = device.place.empty(sizes["w" if gradient == "weight" else "x"], "float32")
    for name, tensor in zip(used(gradient), tensors, strict=True):
        tensor.bind_input(binding, name)
    result.bind_output(binding, "result")
    kept = [*tensors, result]  # the binding has only addresses

    def run(options: object = None) -> None:
        assert kept, "memory that the binding points to"
        session.run_with_iobinding(binding, options)

    def memory() -> int | None:
        if device is CPU:
            return None
        run(releasing(device.arena))
        before = device_memory().free
        run()
        taken = before - device_memory().free
        run(releasing(device.arena))
        return taken

    return Program(form, chosen, run, memory, arena)


def pytorch(shape: Shape, gradient: str, device: str) -> Program:
    """PyTorch's own gradient."""
    x, w, dy = (torch.randn(size, device=device) for size in operands(shape).values())
    wanted = [gradient == "input", gradient == "weight", False]
    pad = [shape.kernel // 2] * 2

    def run() -> None:
        torch.ops.aten.convolution_backward(dy, x, w, None, [shape.stride] * 2, pad, [1, 1], False, [0, 0], 1, wanted)
        if device == "cuda":
            torch.cuda.synchronize()

    def memory() -> int | None:
        if device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        result = 4 * math.prod(operands(shape)["w" if gradient == "weight" else "x"])
        return torch.cuda.max_memory_allocated() - before - result

    return Program(PYTORCH, False, run, memory, None)


def measure(shape: Shape, gradient: str, device: Provider, rounds: int) -> list[Row]:
    """All forms of a gradient, in turn; PyTorch where it has the device."""
    programs = [
        exported(shape, gradient, name, forms, chosen, device)
        for name, (forms, chosen) in candidates(shape, gradient).items()
    ]
    where = "cpu" if device is CPU else "cuda"
    if where == "cpu" or torch.cuda.is_available():
        programs.append(pytorch(shape, gradient, where))
    times: dict[str, list[float]] = {program.form: [] for program in programs}
    for number in range(WARM_UPS + rounds):
        for program in programs:
            began = time.perf_counter()
            program.run()
            if number >= WARM_UPS:
                times[program.form].append(time.perf_counter() - began)
    return [
        Row(str(shape), gradient, p.form, p.chosen, median(times[p.form]), p.memory(), p.arena_bytes) for p in programs
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    lines = ["| shape | gradient | form | ms | memory | arena |", "|---|---|---|--:|--:|--:|"]
    for row in rows:
        sizes = ("-" if b is None else f"{b / (1 << 20):.1f} MiB" for b in (row.memory_bytes, row.arena_bytes))
        name = f"{row.form} *" if row.chosen else row.form
        lines.append(f"| {row.shape} | {row.gradient} | {name} | {1000 * row.seconds:.3f} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> list[str]:
    """For each gradient and form: how much slower than the fastest form it is, over the shapes that it has."""
    lines = []
    for gradient in ("weight", "input"):
        own = [row for row in rows if row.gradient == gradient and row.form != PYTORCH]
        best = {shape: min(r.seconds for r in own if r.shape == shape) for shape in {r.shape for r in own}}
        marked = [row.seconds / best[row.shape] for row in own if row.chosen]
        for form in dict.fromkeys(row.form for row in own):
            times = [row.seconds / best[row.shape] for row in own if row.form == form]
            lines.append(f"{gradient}, {form}: {geometric_mean(times):.2f} times the fastest, over {len(times)} shapes")
        if marked:
            lines.append(f"{gradient}, what is exported for CUDA: {geometric_mean(marked):.2f} times the fastest")
    return lines


def section(rows: Sequence[Row], tf32: bool, command: str) -> str:
    """What docs/cuda.md has of it."""
    found = "\n".join(f"- {line}" for line in verdict(rows))
    precision = "on" if tf32 else "off"
    return f"""float32, TF32 {precision}, median of interleaved runs. The forms are those of `exporters/forms.py`; a
star marks what is exported for CUDA (docs/decisions/0016). Memory is what a run takes of the device beside inputs and
result, arena what of it the exporter foresees. Measured by `{command}`.

{found}

{table(rows)}
"""


def kept_rows(options: argparse.Namespace) -> list[Row]:
    """With --write what was measured before with the same settings, to go on from there."""
    found = cuda_result.read(options.result, options.device).get("gradients", {}) if options.write else {}
    same = found.get("settings") == settings(options)
    return [Row(**row) for row in found["rows"]] if same else []


def keep(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Put what was measured so far into the result, as rows and as docs/cuda.md has it."""
    text = section(rows, options.tf32, " ".join(["python benchmarks/cuda_gradients.py", *sys.argv[1:]]))
    value = {"markdown": text, "rows": [asdict(row) for row in rows], "settings": settings(options)}
    cuda_result.put(options.result, options.device, ("gradients",), value)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What rows in one table have in common."""
    return {"tf32": options.tf32, "rounds": options.rounds, "batch": options.batch}


def main() -> None:
    """Measure, print, and with --write keep it for docs/cuda.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tf32", action="store_true", help="let both programs round products to TF32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, help="samples, in place of each shape's own")
    parser.add_argument("--shapes", default=",".join(str(i + 1) for i in range(len(SHAPES))), help="numbers from 1 on")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--write", action="store_true", help="keep it for docs/cuda.md; on cuda only")
    parser.add_argument("--result", type=Path, default=cuda_result.FILE, help="the file that keeps it")
    options = parser.parse_args()
    if options.write and options.device != "cuda":
        parser.error("--write is for --device cuda: figures of a CPU would be read as those of a GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    device = make_provider(options.device, tf32=options.tf32)
    rows = kept_rows(options)
    for number in options.shapes.split(","):
        shape = SHAPES[int(number) - 1]
        shape = shape if options.batch is None else replace(shape, n=options.batch)
        if any(row.shape == str(shape) for row in rows):
            continue
        for gradient in ("weight", "input"):
            rows += measure(shape, gradient, device, options.rounds)
        print(f"{shape}: done", file=sys.stderr, flush=True)
        if options.write:
            keep(rows, options)
    found = {"device": options.device, "tf32": options.tf32, "rows": [asdict(r) for r in rows]}
    print(json.dumps(found) if options.json else "\n".join([table(rows), "", *verdict(rows)]))


if __name__ == "__main__":
    main()
