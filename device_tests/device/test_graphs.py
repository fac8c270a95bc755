"""Which graphs are loaded: the pool, and the plan that foresees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests.device.invented import Invented, manifest
from device_tests.device.runs import RESIDUAL
from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.spec import GraphSpec, Manifest
from edgelocal.memory.needs import PipelineBytes, loaded_bytes
from edgelocal.memory.peaks import Workload
from edgelocal.memory.recency import Recency
from edgelocal.runtime import graphs
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.provider import Provider

SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 100), min_size=1)


@given(SIZES, st.lists(st.integers(0, 7), max_size=60), st.none() | st.integers(1, 250))
def test_the_least_recently_used_go_first_and_no_more_than_need_be(
    sizes: dict[str, int], order: list[int], limit: int | None
) -> None:
    recency, held = Recency(limit), list[str]()
    for number in order:
        key = sorted(sizes)[number % len(sizes)]
        expected = []
        if key in held:
            held.remove(key)
        else:
            while limit is not None and held and sum(sizes[k] for k in held) + sizes[key] > limit:
                expected.append(held.pop(0))
        held.append(key)
        assert recency.use(key, sizes[key]) == expected
        assert recency.held == sum(sizes[k] for k in held)


class Loaded:
    """A graph that takes no memory."""

    def __init__(self, spec: GraphSpec, model: bytes, threads: int, *, provider: Provider, training: bool) -> None:
        self.spec = spec


class Files:
    """A bundle whose files are empty."""

    def read(self, name: str) -> bytes:
        return b""


NETWORKS = st.lists(st.integers(1, 300), min_size=1, max_size=6).map(
    lambda counts: manifest(*(Invented(nodes=n, width_in=8) for n in counts))
)


@settings(max_examples=60, deadline=None)
@given(NETWORKS, st.integers(1, 4), st.sampled_from(["interleaved", "sequential"]), st.floats(0, 1))
def test_a_plan_foresees_what_is_loaded_while_a_block_works(
    network: Manifest, parts: int, schedule: str, share: float
) -> None:
    work = Workload.of(
        network,
        batch=16,
        schedule=schedule,
        idle_bytes=0,
        pipeline=PipelineBytes(0, 0),
        validates=True,
        micro_batch=16 // parts,
        threads=1,
    )
    micro = [16 // parts] * len(network.blocks)
    least, most = (work.graph_bytes(micro, every=every) for every in (False, True))
    limit = least + int(share * (most - least))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "Graph", Loaded)
        pool = GraphPool(Files(), 1, limit)  # type: ignore[arg-type]
        assert work.graphs_beside(micro, limit) == held_at_most(pool, network, schedule, whole=parts == 1)


def held_at_most(pool: GraphPool, network: Manifest, schedule: str, *, whole: bool) -> list[int]:
    """Of a training of five epochs of four steps, validated after each, or five such stages."""
    found = [0] * len(network.blocks)

    def use(index: int, *specs: GraphSpec | None) -> None:
        for spec in filter(None, specs):
            pool.get(spec)
            held = sum(loaded_bytes(graph.spec, 1) for graph in pool._graphs.values())
            found[index] = max(found[index], held)

    def train(index: int) -> None:
        block = network.blocks[index]
        assert block.accumulation is not None
        use(index, *((block.step,) if whole else (block.accumulation.gradient, block.accumulation.apply)))

    def validate() -> None:
        for block in network.blocks:
            for spec in filter(None, (block.forward, block.head)):
                pool.get(spec)
        pool.start_anew()

    for epoch in range(5 if schedule == "interleaved" else 5 * len(network.blocks)):
        for _ in range(4):
            if schedule == "interleaved":
                for index in range(len(network.blocks)):
                    train(index)
            else:
                index = epoch // 5
                use(index, *(block.forward for block in network.blocks[:index]))
                train(index)
        validate()
        if schedule == "sequential" and epoch % 5 == 4:
            pool.release()  # the end of a stage
    return found


def test_a_pool_that_keeps_all_keeps_them_when_it_starts_anew(tmp_path: Path) -> None:
    bundle = open_bundle(RESIDUAL)
    spec = bundle.manifest.blocks[0].forward
    kept, limited = GraphPool(bundle, 1), GraphPool(bundle, 1, 1)
    for pool in (kept, limited):
        first = pool.get(spec)
        pool.start_anew()
        assert (pool.get(spec) is first) == (pool is kept)
    assert (kept.loads, limited.loads) == (1, 2)
