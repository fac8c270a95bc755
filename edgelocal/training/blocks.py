"""The blocks of a bundle, made ready to work: graphs, state, and where that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edgelocal.bundle.folder import Bundle
from edgelocal.bundle.spec import BlockSpec
from edgelocal.memory.planned import Plan
from edgelocal.runtime.block import Block
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.pages import PREFIX, HostPage, Page, PageFile
from edgelocal.runtime.provider import CPU, Provider
from edgelocal.storage.tensors import Array
from edgelocal.training.checkpoint import check_tensors

Allocator = Callable[[tuple[int, ...], str], Array]  # shape and dtype -> memory of the host


def load_blocks(
    bundle: Bundle,
    threads: int,
    tensors: Mapping[str, Array] | None,
    plan: Plan | None = None,
    page_folder: Path | None = None,
    *,
    artifacts: bool = False,
    provider: Provider = CPU,
    waiting: Allocator | None = None,
) -> list[Block]:
    """The blocks of a bundle with their initial state, or with that of a checkpoint.

    What the plan does not keep in memory waits in `page_folder`, or in memory of the host that `waiting` gives. Tensors
    that are read when asked for are asked for one at a time, and none is kept but in its block. With `artifacts` they
    train by ONNX Runtime's own, else by graphs that `provider` runs.

    Raises:
        CheckpointError: the tensors are not the state of these blocks.
    """
    if tensors is not None:
        check_tensors(tensors, bundle.manifest)
    graphs = GraphPool(bundle, threads, plan.graphs_bytes if plan else None, provider)
    blocks = []
    for index, spec in enumerate(bundle.manifest.blocks):
        state = None if tensors is None else _BlockState(spec, tensors)
        paged = plan is not None and not plan.blocks[index].resident
        page = _page(spec, plan, page_folder, waiting) if paged else None
        blocks.append(Block(bundle, index, graphs, state, page, artifacts=artifacts))
    return blocks


def _page(spec: BlockSpec, plan: Plan | None, folder: Path | None, waiting: Allocator | None) -> Page | None:
    """Where the state of a block waits that does not stay with the others."""
    if waiting is not None and plan is not None and plan.device is not None and plan.device.paging == "host":
        return HostPage(spec.state(), waiting)
    return None if folder is None else PageFile(folder / f"{PREFIX}{spec.name}", spec.state())


class _BlockState(Mapping[str, Array]):
    """Of the states of all blocks, that of one, by the names of its graphs' inputs."""

    def __init__(self, spec: BlockSpec, tensors: Mapping[str, Array]) -> None:
        self._places = {t.name: f"{spec.name}:{t.name}" for t in spec.state()}
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array:
        return self._tensors[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
