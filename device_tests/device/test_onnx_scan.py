"""Hostile graphs, made field by field: each is refused by what it holds, and none reaches the runtime."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from device_tests.device.runs import DROPOUT, RESIDUAL, answer, copy_bundle, put, slowness, write_data
from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.bundle.onnx_scan import scan
from edgelocal.bundle.onnx_wire import bind, compose
from edgelocal.bundle.protobuf import BYTES, FIXED32, VARINT, Field, render
from edgelocal.bundle.spec import graphs_of
from edgelocal.errors import BundleError
from edgelocal.runtime import provider, session

FILE = "blocks/00/forward.onnx"
MODEL = (DROPOUT / FILE).read_bytes()


def inside(number: int, *fields: Field) -> Field:
    """A field that is a message."""
    return number, BYTES, render(fields)


def text(number: int, value: str) -> Field:
    return number, BYTES, value.encode()


def graph(*fields: Field) -> Field:
    return inside(7, *fields)


def node(*fields: Field) -> Field:
    return graph(inside(1, text(1, "x"), text(2, "y"), text(4, "Identity"), *fields))


def location(value: str = "../../secret.bin") -> Field:
    """An entry of TensorProto.external_data."""
    return inside(13, text(1, "location"), text(2, value))


def attribute(*fields: Field) -> Field:
    return node(inside(5, text(1, "value"), *fields))


OUTSIDE: Field = (14, VARINT, 1)  # TensorProto.data_location = EXTERNAL
SUBGRAPH = (text(2, "body"), inside(5, location(), OUTSIDE))
OPERATORS = {"": 18, "ai.onnx": 18}


def operators(domain: str, version: int) -> Field:
    return inside(8, text(1, domain), (2, VARINT, version))


REFUSED: list[tuple[str, Field, str]] = [
    ("external data", graph(inside(5, text(8, "w"), location(), OUTSIDE)), "external data"),
    ("external data by address", graph(inside(5, location("*/_ORT_MEM_ADDR_/*"))), "external data"),
    ("external data, empty entry", graph(inside(5, inside(13))), "external data"),
    ("external location alone", graph(inside(5, OUTSIDE)), "external data"),
    ("external location of a long number", graph(inside(5, (14, VARINT, (1 << 32) + 1))), "external data"),
    ("external data in an attribute", attribute(inside(5, location())), "external data"),
    ("external data in a list", attribute(inside(10, location())), "a list of tensors"),
    ("external data in a subgraph", attribute(inside(6, *SUBGRAPH)), "a subgraph"),
    ("external data in subgraphs", attribute(inside(11, *SUBGRAPH)), "subgraphs"),
    ("external data in training information", inside(20, inside(1, *SUBGRAPH)), "training information"),
    ("external data in a function", inside(25, inside(7, inside(5, inside(5, location())))), "functions"),
    ("external data in a sparse tensor", graph(inside(15, inside(1, location()))), "a sparse tensor"),
    ("external data in a sparse attribute", attribute(inside(22, inside(1, location()))), "a sparse tensor"),
    ("external data in sparse attributes", attribute(inside(23, inside(1, location()))), "sparse tensors"),
    ("a loop", node(text(4, "Loop"), inside(5, text(1, "body"), inside(6))), "a subgraph"),
    ("an unknown field of a tensor", graph(inside(5, text(16, "x"))), "field 16 of a tensor"),
    ("an unknown field of an attribute", attribute((21, BYTES, b"x")), "field 21 of an attribute"),
    ("an unknown field of a node", node((8, BYTES, b"overload")), "field 8 of a node"),
    ("an unknown field of a graph", graph((14, BYTES, b"")), "field 14 of a graph"),
    ("an unknown field of a model", (26, BYTES, b""), "field 26 of a model"),
    ("a field number over 32 bits", ((1 << 32) + 2, BYTES, b""), "field 4294967298 of a model"),
    ("a node of another domain", node(text(7, "com.microsoft")), "an operator of another domain"),
    ("a domain with a zero byte", node(text(7, "ai.onnx\0")), "an operator of another domain"),
    ("a domain that is a number", node((7, VARINT, 0)), "an operator of another domain"),
    ("operators of another domain", operators("ai.onnx.ml", 1), "operators of another domain"),
    ("operators of another domain after ours", inside(8, text(1, ""), text(1, "evil")), "operators of another domain"),
    ("newer operators", operators("", 19), "an operator set other than 1 to 18"),
    ("operators of version 0", operators("", 0), "an operator set other than 1 to 18"),
    ("operators of version -1", operators("", (1 << 64) - 1), "an operator set other than 1 to 18"),
    ("a newer IR", (1, VARINT, 9), "an IR version other than 3 to 8"),
    ("an IR of -1", (1, VARINT, (1 << 64) - 1), "an IR version other than 3 to 8"),
    ("an IR that is no number", (1, FIXED32, b"\x08\0\0\0"), "an IR version other than 3 to 8"),
]


@pytest.mark.parametrize(("field", "what"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_no_graph_of_a_bundle_has_is_refused(field: Field, what: str) -> None:
    """Protobuf joins the parts of a message, so a field put behind a whole model is a part of it."""
    for hostile in (MODEL + render([field]), render([field]) + MODEL):
        with pytest.raises(BundleError, match=rf"^{FILE}: ONNX with {what}, which no graph of a bundle has; export"):
            scan(hostile, FILE)
        with pytest.raises(BundleError, match=rf"^ONNX with {what}"):
            bind(compose([hostile]), {})


@pytest.mark.parametrize(
    "field",
    [
        graph(inside(5, (14, VARINT, 0))),
        node(text(7, "")),
        node(text(7, "ai.onnx")),
        operators("", 18),
        operators("ai.onnx", 1),
        text(2, "producer"),
        attribute(inside(5, (1, VARINT, 3), (2, VARINT, 1), (9, BYTES, b"\0" * 12))),
    ],
)
def test_what_the_format_promises_is_not_refused(field: Field) -> None:
    scan(MODEL + render([field]))


@pytest.mark.parametrize("depth", [5, 5000])
def test_depth_ends_where_the_format_ends(depth: int) -> None:
    data = b""
    for _ in range(depth):
        data = render([(7, BYTES, data)])
    with pytest.raises(BundleError, match="field 7 of a graph"):
        scan(data)


def test_only_bundle_errors_leave_under_damaged_bytes() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(MODEL)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            scan(bytes(damaged))
        except BundleError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("folder", [RESIDUAL, DROPOUT])
def test_every_graph_of_a_bundle_is_in_order(folder: Path) -> None:
    for spec in graphs_of(open_bundle(folder).manifest):
        scan((folder / spec.file).read_bytes(), spec.file)


def test_a_graph_of_a_mebibyte_is_scanned_in_a_tenth_of_a_second() -> None:
    """The step graph of the residual bundle, its nodes repeated. Processor time, the best of five."""
    whole = (RESIDUAL / "blocks/00/step.onnx").read_bytes()
    model = whole * ((1 << 20) // len(whole) + 1)
    times = []
    for _ in range(5):
        started = time.process_time()
        scan(model)
        times.append(time.process_time() - started)
    assert min(times) < 0.1 * slowness()


def test_the_runtime_never_sees_a_hostile_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> Any:
        raise AssertionError("the runtime was asked for")

    monkeypatch.setattr(provider, "runtime", seen)
    spec = next(g for g in graphs_of(open_bundle(DROPOUT).manifest) if g.file == FILE)
    for _, field, what in REFUSED:
        with pytest.raises(BundleError, match=what):
            session.Graph(spec, MODEL + render([field]), 1)


@pytest.mark.parametrize("name", [g.file for g in graphs_of(open_bundle(DROPOUT).manifest)])
def test_verify_scans_every_graph(tmp_path: Path, name: str) -> None:
    bundle = copy_bundle(DROPOUT, tmp_path / "b")
    put(bundle, name, (bundle / name).read_bytes() + render([REFUSED[0][1]]))
    with pytest.raises(BundleError, match=rf"^{name}: ONNX with external data"):
        verify(open_bundle(bundle))


def test_a_hostile_graph_exits_with_4_and_writes_nothing(tmp_path: Path) -> None:
    bundle = copy_bundle(DROPOUT, tmp_path / "b")
    put(bundle, FILE, MODEL + render([REFUSED[0][1]]))
    data = write_data(tmp_path / "d.npz", DROPOUT)
    assert "external data" in answer("train", bundle, "--data", data, "--out", tmp_path / "r", code=4)["error"]
    assert "external data" in answer("verify", bundle, code=4)["error"]
    assert not (tmp_path / "r").exists()


def test_the_runtimes_own_format_is_not_read() -> None:
    """A flatbuffer of ONNX Runtime is known by ORTM at byte 4, where a protobuf may hold a text."""
    disguised = b"\x12\x7f\0\0ORTM".ljust(129, b"\0") + MODEL
    scan(disguised)
    spec = next(g for g in graphs_of(open_bundle(DROPOUT).manifest) if g.file == FILE)
    assert session.Graph(spec, disguised, 1).spec == spec
