"""What an ONNX file of a bundle may hold, checked on its bytes before the runtime sees any of them.

docs/format.md promises standard operators and nothing outside of the file. The fields that such a graph needs are
listed here by message (numbers as in onnx.proto3), and a file with any other is refused: external data, sparse tensors,
subgraphs and with them loops, functions, training information, and whatever a later version of the format brings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from edgelocal.bundle.protobuf import as_bytes, fields
from edgelocal.errors import BundleError

IR_VERSION, OPSET = 8, 18
DOMAINS = (b"", b"ai.onnx")


@dataclass(frozen=True)
class _Message:
    """A kind of message by its fields: those with any value, with one of some values, and with messages inside."""

    name: str
    free: frozenset[int]
    bound: Mapping[int, Collection[bytes | int]] = field(default_factory=dict)
    inner: Mapping[int, _Message] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)  # what to call what is none of these


_TENSOR = _Message(
    "a tensor",  # 1 dims, 2 data_type, 4 to 7 and 9 to 11 data, 8 name, 12 doc_string
    free=frozenset((1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
    bound={14: (0,)},  # data_location: in the file
    refused={13: "external data", 14: "external data"},
)
_ATTRIBUTE = _Message(
    "an attribute",  # 1 name, 2 to 4 number and text, 7 to 9 lists of them, 13 doc_string, 20 type
    free=frozenset((1, 2, 3, 4, 7, 8, 9, 13, 20)),
    inner={5: _TENSOR},
    refused={6: "a subgraph", 10: "a list of tensors", 11: "subgraphs", 22: "a sparse tensor", 23: "sparse tensors"},
)
_NODE = _Message(
    "a node",  # 1 input, 2 output, 3 name, 4 op_type, 6 doc_string
    free=frozenset((1, 2, 3, 4, 6)),
    bound={7: DOMAINS},
    inner={5: _ATTRIBUTE},
    refused={7: "an operator of another domain"},
)
_GRAPH = _Message(
    "a graph",  # 2 name, 10 doc_string, 11 input, 12 output, 13 value_info
    free=frozenset((2, 10, 11, 12, 13)),
    inner={1: _NODE, 5: _TENSOR},
    refused={15: "a sparse tensor"},
)
_OPSET = _Message(
    "an operator set",
    free=frozenset(),
    bound={1: DOMAINS, 2: range(1, OPSET + 1)},
    refused={1: "operators of another domain", 2: f"an operator set other than 1 to {OPSET}"},
)
_MODEL = _Message(
    "a model",  # 2 to 4 producer and domain, 5 version, 6 doc_string
    free=frozenset((2, 3, 4, 5, 6)),
    bound={1: range(3, IR_VERSION + 1)},
    inner={7: _GRAPH, 8: _OPSET},
    refused={1: f"an IR version other than 3 to {IR_VERSION}", 20: "training information", 25: "functions"},
)

# The same with the operators by which ONNX Runtime's training build derives and adds up gradients, and no others of it.
TRAINING_DOMAIN = b"com.microsoft"
TRAINING_OPERATORS = frozenset(
    (
        *("InPlaceAccumulatorV2", "Scale", "FusedMatMul", "SplitTraining", "ConcatTraining", "ConvGrad", "ReluGrad"),
        *("SoftmaxGrad_13", "LogSoftmaxGrad_13", "LayerNormalizationGrad", "GeluGrad", "SigmoidGrad", "TanhGrad"),
        *("QuickGelu", "QuickGeluGrad", "DivGrad"),
        *("LeakyReluGrad", "GatherGrad", "GatherElementsGrad", "GatherNDGrad", "SliceGrad"),
    )
)
_TRAINING_NODE = replace(_NODE, bound={7: (*DOMAINS, TRAINING_DOMAIN)})
_TRAINING_OPSET = replace(_OPSET, bound={1: (*DOMAINS, TRAINING_DOMAIN), 2: range(1, OPSET + 1)})
_TRAINING_GRAPH = replace(_GRAPH, inner={**_GRAPH.inner, 1: _TRAINING_NODE})
_TRAINING_MODEL = replace(_MODEL, inner={7: _TRAINING_GRAPH, 8: _TRAINING_OPSET})


def scan(model: bytes, file: str = "", *, training: bool = False) -> None:
    """Check the bytes of a graph; `file` is its name in errors. With `training` it is one of ONNX Runtime's training
    artifacts, which has operators of that runtime too.

    Raises:
        BundleError: it holds what no graph of a bundle needs, or is no protobuf message.
    """
    try:
        _scan(model, _TRAINING_MODEL if training else _MODEL)
        if training:
            _check_operators(model)
    except BundleError as error:
        raise BundleError(f"{file}: {error}" if file else str(error)) from None


def _scan(message: bytes, kind: _Message) -> None:
    free, bound, inner = kind.free, kind.bound, kind.inner
    for number, wire, value in fields(message):
        if number in free:
            continue
        if number in inner:
            _scan(as_bytes((number, wire, value)), inner[number])
        elif value not in bound.get(number, ()):
            what = kind.refused.get(number, f"field {number} of {kind.name}")
            raise BundleError(f"ONNX with {what}, which no graph of a bundle has; export the bundle again")


def _check_operators(model: bytes) -> None:
    """That of the runtime's own domain only the known ones are used."""
    for graph in (as_bytes(f) for f in fields(model) if f[0] == 7):
        for node in (as_bytes(f) for f in fields(graph) if f[0] == 1):
            parts = {field[0]: as_bytes(field) for field in fields(node)}  # all fields of a node are bytes
            kind = parts.get(4, b"").decode(errors="replace")
            if parts.get(7) == TRAINING_DOMAIN and kind not in TRAINING_OPERATORS:
                raise BundleError(f"ONNX with the operator {kind!r}, which no training artifact has; export again")
