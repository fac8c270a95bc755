"""network reference + settings -> bundle folder: `edgelocal export` as one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from edgelocal import __version__
from edgelocal.bundle.folder import MANIFEST
from edgelocal.bundle.manifest import parse_manifest, render_manifest
from edgelocal.bundle.onnx_wire import compose
from edgelocal.bundle.spec import (
    BlockSpec,
    FrontierSpec,
    GraphSpec,
    Manifest,
    RuleSpec,
    TensorSpec,
)
from edgelocal.errors import BundleError, EdgelocalError, ExportError, UsageError
from edgelocal.exporters.block_files import Writer, write_block
from edgelocal.exporters.guest import guest, network_errors
from edgelocal.exporters.macs import Counter, block_macs
from edgelocal.exporters.partition import partition
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import build_blocks, find
from edgelocal.exporters.search.comparison import beside_bp
from edgelocal.exporters.search.fit import Fit, fit
from edgelocal.exporters.search.trial import partition_point
from edgelocal.exporters.units import Network, check_composition, load_network
from edgelocal.exporters.weights import load_weights
from edgelocal.storage.whole import atomic_write, staging

Say = Callable[[str], None]


def export_bundle(request: ExportRequest, out: Path, say: Say) -> dict[str, Any]:
    """Write the bundle folder `out`, all or nothing, and return what is in it.

    Until it returns, what the process prints to stdout goes to stderr (see `edgelocal.exporters.guest`).

    Raises:
        UsageError: a setting out of range, or `out` exists.
        ExportError: the network cannot be exported; the message names the module.
        StorageError: the disk refused a write.
    """
    request.check()
    # The network's code may change the current folder.
    out = out.absolute()
    if request.weights is not None:
        request = replace(request, weights=request.weights.absolute())
    with guest(request.network), staging(out) as folder:
        return _write(request, folder, say)


def _write(request: ExportRequest, folder: Path, say: Say) -> dict[str, Any]:
    dtype = getattr(torch, request.input.dtype)
    network = load_network(request.network, request.input.shape, request.task.classes, request.seed, dtype)
    notes: list[str] = []
    if request.weights is not None:
        notes = load_weights(request.weights, network.module, partial=request.partial_weights).lines()
        for note in notes:
            say(note)
    check_composition(network)
    tail = _tail(request.rule.tail)
    with network_errors(f"{network.name}: a trial run in training mode"):
        found = _partitioned(network, request, tail, say)
    blocks = build_blocks(network, request.rule, found.cut, request.seed, found.depths)
    depths = found.depths or _rule_depths(request.rule, len(blocks))
    counter = Counter()
    writer = Writer(folder)
    specs: list[BlockSpec] = []
    shape = tuple(request.input.shape)
    for block in blocks:
        say(f"block {block.name} of {len(blocks)}: {', '.join(block.unit_names)}")
        spec = write_block(writer, block, request, shape, dtype, block_macs(block, shape, dtype, counter))
        depth = depths[len(specs)] if len(specs) < len(depths) else None
        specs.append(replace(spec, depth=depth))
        shape = spec.step.outputs[0].shape[1:]  # type: ignore[assignment]  # only the first dimension is symbolic
        dtype = getattr(torch, spec.step.outputs[0].dtype)
    predict = _write_predict(writer, specs)
    manifest = Manifest(
        network=network.name,
        seed=request.seed,
        units=tuple(u.name for u in network.units),
        rule=request.rule,
        input=request.input,
        task=request.task,
        optimizer=request.optimizer.spec(),
        augment=request.augment,
        defaults=request.defaults,
        blocks=tuple(specs),
        predict=predict,
        versions={"edgelocal": __version__, **{name: version(name) for name in ("torch", "onnx")}},
        files=writer.files,
        frontier=_frontier(network, request, found.others, specs, counter, say),
        target=request.target,
        precision=request.precision,
    )
    atomic_write(folder / MANIFEST, [_acceptable(manifest)])
    return summary(manifest) | {"weights": notes}


def _partitioned(network: Network, request: ExportRequest, tail: Literal["merge", "all"], say: Say) -> Fit:
    if request.budget_bytes is not None:
        return fit(network, request, request.budget_bytes, say)
    cut = partition(network, blocks=request.blocks, rule=request.rule.name, depth=request.rule.depth, tail=tail)
    return Fit(cut, None, ())


def _frontier(
    network: Network,
    request: ExportRequest,
    others: tuple[FrontierSpec, ...],
    specs: Sequence[BlockSpec],
    counter: Counter,
    say: Say,
) -> tuple[FrontierSpec, ...]:
    """The exported blocks among `others`, or among estimates where there are none. That these cannot be made must not
    keep a bundle from being written."""
    macs = sum(s.macs.training + s.macs.training_auxiliary for s in specs if s.macs is not None)
    point = partition_point("partition", specs, macs, request.defaults.batch)
    points = [replace(point, chosen=True), *(p for p in others if p != point)]
    if not others:
        try:
            with network_errors("a trial run of the units"):
                points += beside_bp(network, request, specs, points[0], counter)
        except EdgelocalError as error:
            say(f"the blocks are not compared with back-propagation: {error}")
    return tuple(sorted(points, key=lambda p: p.working_set_bytes))


def _rule_depths(rule: RuleSpec, blocks: int) -> tuple[int | None, ...]:
    wanted = find(rule.name).depths
    return wanted(blocks, rule) if wanted is not None else ()


def _acceptable(manifest: Manifest) -> bytes:
    """The manifest as bytes: what no reader would accept must not be written."""
    rendered = render_manifest(manifest)
    try:
        parse_manifest(rendered)
    except BundleError as error:
        raise ExportError(f"no device would accept this bundle: {error}") from error
    return rendered


def _tail(tail: str) -> Literal["merge", "all"]:
    if tail == "merge":
        return "merge"
    if tail == "all":
        return "all"
    raise UsageError(f"there is no tail policy {tail!r}; choose merge or all")


def _write_predict(writer: Writer, blocks: Sequence[BlockSpec]) -> GraphSpec:
    models = [(writer.folder / b.forward.file).read_bytes() for b in blocks]
    writer.write("predict.onnx", [compose(models)])
    weights = {t.name: t for b in blocks for t in b.forward.inputs[1:]}
    output = blocks[-1].forward.outputs[0]
    logits = TensorSpec("logits", output.shape, output.dtype)
    return GraphSpec("predict.onnx", (blocks[0].forward.inputs[0], *weights.values()), (logits,))


def summary(manifest: Manifest) -> dict[str, Any]:
    """What `export` and `inspect` print of a bundle."""
    from edgelocal.commands.inspect import describe_bundle

    return describe_bundle(manifest)
