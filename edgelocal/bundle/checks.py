"""What must hold in a manifest beyond the types of its fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import zip_longest

from edgelocal.bundle.artifacts import RESET, gradient_buffer
from edgelocal.bundle.spec import (
    BATCH,
    LOSSES,
    PAD_MODES,
    PRECISIONS,
    TARGETS,
    AccumulationSpec,
    BlockSpec,
    GraphSpec,
    InputSpec,
    Manifest,
    OrtTrainingSpec,
    TensorSpec,
    graphs_of,
)
from edgelocal.storage.decode import expect

MAX_TENSORS = 65_536
MAX_RANK = 8
MAX_NAME = 256
DTYPES = ("float32", "int64", "bool")
FIRST_WITH_TARGET = 4  # of the schemas
BLOCK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


def check(manifest: Manifest) -> None:
    """Rules that types cannot express.

    Raises:
        DecodeError: one is broken.
    """
    _check_target(manifest)
    _check_graphs(manifest)
    names = [block.name for block in manifest.blocks]
    expect(len(names) > 0, "manifest.blocks", "at least one block", 0)
    expect(len(set(names)) == len(names), "manifest.blocks", "a name of its own for each block", names)
    for block in manifest.blocks:
        expect(BLOCK_NAME.fullmatch(block.name) is not None, "manifest.blocks", "a plain name", block.name)
        own = [block.weights]
        own += [block.ort_training.optimizer, block.ort_training.checkpoint] if block.ort_training else []
        for file in own:
            expect(file in manifest.files, f"block {block.name}", "files that are listed", file)
        modelled = block.memory is not None and block.accumulation is not None
        expect(modelled or manifest.schema == 1, f"block {block.name}", "its memory and its accumulation", None)
        _check_block(block, "absolute_error" if manifest.task.loss == "mse" else "correct")
        _check_state(block)
        _check_second_target(block, manifest)
    for name, entry in manifest.files.items():
        _check_path(name)
        expect(entry.size >= 0 and len(entry.sha256) == 64, name, "a size and a sha256", entry)
    _check_input(manifest.input)
    _check_chain(manifest)
    _check_choices(manifest)


def _check_graphs(manifest: Manifest) -> None:
    graphs = graphs_of(manifest)
    count = sum(len(graph.inputs) + len(graph.outputs) for graph in graphs)
    expect(count <= MAX_TENSORS, "manifest", f"at most {MAX_TENSORS} tensors", count)
    absent = _replaced(manifest)
    for graph in graphs:
        there = graph.file in manifest.files or any(graph is known for known in absent)
        expect(there, graph.file, "a file listed in files", graph.file)
        for tensors in (graph.inputs, graph.outputs):
            for tensor in tensors:
                _check_tensor(tensor, f"{graph.file}: {tensor.name[:64]}")
            names = [t.name for t in tensors]
            expect(len(set(names)) == len(names), graph.file, "a name of its own for each tensor", names)
        _check_hints(graph)
    _check_names(manifest.predict, ("x",), ("logits",))


def _check_chain(manifest: Manifest) -> None:
    """That a block takes what the one before it puts out, in every form that it has, and the first the samples."""
    given = TensorSpec("x", (BATCH, *manifest.input.shape), manifest.input.dtype)
    for block in manifest.blocks:
        h = block.step.outputs[0]
        second = (block.accumulation.gradient,) if block.accumulation else ()
        for graph in (block.step, block.forward, *second):
            _check_same(graph, graph.inputs[0], given)
            _check_same(graph, graph.outputs[0], h)
        if block.head is not None:
            _check_same(block.head, block.head.inputs[0], h)
        given = TensorSpec("x", h.shape, h.dtype)


def _check_same(graph: GraphSpec, found: TensorSpec, expected: TensorSpec) -> None:
    form = f"{expected.dtype} {list(expected.shape)}, as the other graphs say"
    expect(found == expected, f"{graph.file}: {found.name[:64]}", form, f"{found.dtype} {list(found.shape)}")


def _replaced(manifest: Manifest) -> tuple[GraphSpec, ...]:
    """The graphs that a bundle may only describe: all those that the artifacts of ONNX Runtime's training stand for."""
    if not all(block.ort_training and block.accumulation for block in manifest.blocks):
        return ()
    graphs = tuple(g for b in manifest.blocks if b.accumulation for g in (b.step, b.accumulation.gradient))
    return graphs if manifest.files.keys().isdisjoint(g.file for g in graphs) else ()


def _check_hints(graph: GraphSpec) -> None:
    """What is written over must be of the form of what is written."""
    inputs, outputs = ({t.name: t for t in tensors} for tensors in (graph.inputs, graph.outputs))
    for name in graph.in_place or ():
        old, new = inputs.get(name), outputs.get(f"new/{name}")
        same = old is not None and new is not None and (old.shape, old.dtype) == (new.shape, new.dtype)
        expect(same, f"{graph.file}: in_place", "an input with a new value of its shape", name)
    if graph.nodes is not None:
        expect(0 <= graph.nodes <= 1 << 24, graph.file, "a number of nodes", graph.nodes)


def _check_block(block: BlockSpec, metric: str) -> None:
    """That its graphs take and put out what docs/format.md says."""
    step = block.step
    _check_names(step, ("x", "y"), ("h", "loss", metric, *(f"new/{t.name}" for t in block.state())))
    _check_names(block.forward, ("x",), ("h",))
    if block.head is not None:
        _check_names(block.head, ("h",), ("logits",))
    if block.accumulation is not None:
        _check_accumulation(block, block.accumulation, metric)
    if block.memory is not None:
        _check_memory(block)
    if block.ort_training is not None:
        _check_artifacts(block, block.ort_training, metric)
    for tensor in step.outputs[1:3]:
        expect(tensor.shape == (), f"{step.file}: {tensor.name}", "the shape of a number, []", list(tensor.shape))
    inputs = {t.name for t in step.inputs}
    for mask in block.masks:
        expect(mask.name in inputs, step.file, "an input for each mask", mask.name)
        expect(0 <= mask.keep <= 1, f"block {block.name}: {mask.name[:64]}", "a probability", mask.keep)


def _check_accumulation(block: BlockSpec, second: AccumulationSpec, metric: str) -> None:
    """That gradients are added to sums of their shape, and that these are what the update takes."""
    state = {t.name: t for t in block.state()}
    sums = [t for t in second.gradient.inputs if t.kind == "acc"]
    buffers = [name for name, t in state.items() if t.kind == "buf"]
    new = (*(t.name for t in sums), *buffers)
    _check_names(second.gradient, ("x", "y", "share"), ("h", "loss", metric, *(f"new/{name}" for name in new)))
    taken = [t for t in second.apply.inputs if t.kind == "acc"]
    expect(taken == sums, second.apply.file, "the sums of the gradient graph", [t.name for t in taken])
    for graph in (second.gradient, second.apply):
        for tensor in graph.inputs:
            known = state.get(tensor.name) if tensor.kind in ("param", "opt", "buf") else tensor
            expect(tensor == known, f"{graph.file}: {tensor.name[:64]}", "a tensor of the block's state", tensor)
    for tensor in sums:
        parameter = state.get("param/" + tensor.name.partition("/")[2])
        same = parameter is not None and (parameter.shape, parameter.dtype) == (tensor.shape, tensor.dtype)
        expect(same, f"{second.gradient.file}: {tensor.name[:64]}", "the shape of its parameter", list(tensor.shape))
    written = [t.name for t in second.apply.outputs]
    updated = {f"new/{name}" for name, t in state.items() if t.kind in ("param", "opt")}
    expect(set(written) <= updated, second.apply.file, "outputs that are the block's state", written)


def _check_artifacts(block: BlockSpec, given: OrtTrainingSpec, metric: str) -> None:
    """That the training model takes the block's state and a buffer for every gradient, all as float32, and puts out
    what the step graph does."""
    expect(block.accumulation is not None, f"block {block.name}", "an update for its artifacts", None)
    assert block.accumulation is not None
    data = ("x", "y", *(mask.name for mask in block.masks))
    kept = {t.name: t.shape for t in block.state() if t.kind in ("param", "buf")}
    sums = {gradient_buffer(t.name): t.shape for t in block.accumulation.apply.inputs if t.kind == "acc"}
    known = {t.name: (t.shape, t.dtype) for t in block.step.inputs if t.name in data}
    known |= {name: (shape, "float32") for name, shape in (kept | sums).items()} | {RESET: ((1,), "bool")}
    h, loss, count = block.step.outputs[:3]
    for graph in (given.training, given.evaluation):
        expect(graph.structure is None, graph.file, "no structure: its tensors are known by name", graph.structure)
        expect(graph.outputs[:3] == (loss, h, count), graph.file, f"{metric}, loss and h as of the step", graph.outputs)
        for tensor in graph.outputs[3:]:
            expect((tensor.shape, tensor.dtype) == ((1,), "bool"), graph.file, "flags behind them", tensor)
        for tensor in graph.inputs:
            expect(known.get(tensor.name) == (tensor.shape, tensor.dtype), graph.file, "a tensor of the block", tensor)
    missing = sorted((kept | sums | {RESET: (1,)}).keys() - {t.name for t in given.training.inputs})
    expect(not missing, given.training.file, "an input for all state, gradients and their reset", missing)


def _check_memory(block: BlockSpec) -> None:
    """That a memory model can be computed with: a device plans by it before it reads anything else."""
    assert block.memory is not None
    models = [getattr(block.memory, field.name) for field in dataclasses.fields(block.memory)]
    if block.cuda is not None:
        models += [block.cuda.step_memory, block.cuda.gradient_memory]
    for model in (m for m in models if m is not None):
        where = f"block {block.name}: memory"
        batches = [point[0] for point in model.arena if len(point) == 3]
        expect(len(batches) == len(model.arena) >= 2, where, "batch, bytes touched and bytes of region", model.arena)
        fits = all(touched <= region for _, touched, region in model.arena)
        expect(fits, where, "regions no smaller than what is touched of them", model.arena)
        expect(batches == sorted(set(batches)) and batches[0] == 1, where, "rising batches from 1 on", batches)
        expect(len(model.peaks) > 0, where, "at least one peak", model.peaks)
        affine = [a for p in model.peaks for a in (p.activations, p.gradients, p.workspace)]
        numbers = [n for a in affine for n in (a.fixed, a.per_sample)] + [n for point in model.arena for n in point]
        expect(all(0 <= n < 1 << 50 for n in numbers), where, "sizes in bytes", model.peaks)


def _check_state(block: BlockSpec) -> None:
    """That a step puts out the state as it takes it, and that no tensor of it is larger than a file of the bundle."""
    parameters = {t.name: t.shape for t in block.step.inputs if t.kind == "param"}
    for old, new in zip(block.state(), block.step.outputs[3:], strict=True):
        where = f"{block.step.file}: {old.name[:64]}"
        expect(BATCH not in old.shape, where, "a fixed shape", list(old.shape))
        expect((new.shape, new.dtype) == (old.shape, old.dtype), where, "new state of the same shape and dtype", new)
        expect(len(f"{block.name}:{old.name}") <= MAX_NAME, where, "a shorter name for its checkpoint", old.name)
        if old.kind == "opt":  # opt/<slot>/<name> of param/<name>, or one number
            size = parameters.get("param/" + old.name.split("/", 2)[-1], ())
            expect(old.shape == size, where, f"the shape of its parameter, {list(size)}", list(old.shape))


def _check_target(manifest: Manifest) -> None:
    """That it is known what the graphs were written for, and that such graphs there are."""
    target, precision = manifest.target, manifest.precision
    if manifest.schema < FIRST_WITH_TARGET:
        expect(target is None and precision is None, "manifest", "no target, in this schema", (target, precision))
        return
    expect(target in TARGETS, "manifest.target", f"one of {TARGETS}", target)
    expect(precision in PRECISIONS, "manifest.precision", f"one of {PRECISIONS}", precision)
    alone = precision == "float32" or target == "cuda"
    expect(alone, "manifest.precision", f"float32 for the target {target}", precision)


def _check_second_target(block: BlockSpec, manifest: Manifest) -> None:
    """That graphs for another target take and put out what they stand in for does."""
    if block.cuda is None:
        return
    where = f"block {block.name}: cuda"
    expect(manifest.target == "both", where, "no graphs of their own in a bundle for one target", manifest.target)
    expect(block.accumulation is not None, where, "an accumulation that it stands in for", None)
    expect(block.cuda.recomputed >= 0, where, "at least 0 MACs done twice", block.cuda.recomputed)
    assert block.accumulation is not None
    pairs = (block.step, block.cuda.step), (block.accumulation.gradient, block.cuda.gradient)
    for own, other in pairs:
        same = (own.inputs, own.outputs) == (other.inputs, other.outputs)
        expect(same, other.file, f"the inputs and outputs of {own.file}", [t.name for t in other.inputs])
        expect(own.file != other.file, where, "files of its own", other.file)


def _check_names(graph: GraphSpec, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """That the graph's inputs begin with `inputs`, and its outputs are `outputs`."""
    given = [t.name for t in graph.inputs[: len(inputs)]]
    for kind, found, wanted in (("input", given, inputs), ("output", [t.name for t in graph.outputs], outputs)):
        for number, (name, expected) in enumerate(zip_longest(found, wanted, fillvalue="nothing")):
            expect(name == expected, f"{graph.file}: {kind} {number}", repr(expected), name)


def _check_input(given: InputSpec) -> None:
    shape = given.shape
    expect(0 < len(shape) <= MAX_RANK and min(shape) > 0, "manifest.input.shape", "a positive shape", shape)
    widths = {len(given.mean), len(given.std)}
    expect(all(s > 0 for s in given.std), "manifest.input.std", "positive deviations", given.std)
    expect(given.dtype in ("float32", "int64"), "manifest.input.dtype", "float32 or int64", given.dtype)
    expect(widths <= {1, shape[0]}, "manifest.input", f"1 or {shape[0]} means and deviations", widths)


def _check_choices(manifest: Manifest) -> None:
    """Settings outside what this version knows would train something else without a word."""
    task, augment, defaults = manifest.task, manifest.augment, manifest.defaults
    expect(task.loss in LOSSES, "manifest.task.loss", f"one of {LOSSES}", task.loss)
    expect(task.classes > 0, "manifest.task.classes", "at least 1", task.classes)
    expect(0 <= task.label_smoothing < 1, "manifest.task.label_smoothing", "0 <= s < 1", task.label_smoothing)
    expect(augment.mode in PAD_MODES, "manifest.augment.mode", f"one of {PAD_MODES}", augment.mode)
    expect(augment.pad >= 0, "manifest.augment.pad", "at least 0", augment.pad)
    expect(defaults.batch > 0, "manifest.defaults.batch", "at least 1", defaults.batch)
    expect(defaults.epochs > 0, "manifest.defaults.epochs", "at least 1", defaults.epochs)


def _check_tensor(tensor: TensorSpec, where: str) -> None:
    expect(0 < len(tensor.name) <= MAX_NAME, where, f"a name of 1 to {MAX_NAME} characters", tensor.name)
    expect(len(tensor.shape) <= MAX_RANK, where, f"at most {MAX_RANK} dimensions", tensor.shape)
    expect(all(d == BATCH or (type(d) is int and d > 0) for d in tensor.shape), where, "positive dims", tensor.shape)
    expect(BATCH not in tensor.shape[1:], where, "the batch in front or nowhere", tensor.shape)
    expect(tensor.dtype in DTYPES, where, f"one of {DTYPES}", tensor.dtype)
    expect(tensor.elements_per_sample() < 1 << 40, where, "fewer than 2^40 elements", tensor.shape)


def _check_path(name: str) -> None:
    parts = name.split("/")
    plain = all(p not in ("", ".", "..") and "\\" not in p and "\0" not in p for p in parts)
    expect(plain and ":" not in name and len(name) <= MAX_NAME, "manifest.files", "a plain relative path", name)
