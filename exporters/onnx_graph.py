"""An ONNX graph under construction: values, constants and sizes that depend on the batch.

Only standard `ai.onnx` operators of opset 18 are written, so that ONNX Runtime 1.17 and every later one can run the
graph. Weights are inputs; the only initializers are small constants, each written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import sympy
import torch
from onnx import TensorProto, helper, numpy_helper

from edgelocal.exporters.forms import CPU, Forms

OPSET = 18
IR_VERSION = 8
LARGEST_FOLDED = 1 << 16  # elements of a constant that may as well be kept


class UnsupportedOperatorError(Exception):
    """An operator that has no ONNX form here. `target` is its ATen name, `detail` what exactly is missing."""

    def __init__(self, target: str, detail: str = "") -> None:
        super().__init__(f"{target}{': ' if detail else ''}{detail}")
        self.target = target
        self.detail = detail


Dim = int | torch.SymInt
Scalar = bool | int | float | torch.SymInt | torch.SymFloat

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}


def expression(size: Dim | Scalar) -> sympy.Expr:
    """The formula of a number in terms of the batch."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size.node.expr
    return sympy.sympify(size)


def fixed(size: Dim) -> int:
    """A size that must not depend on the batch. Never `int(size)`: that would quietly fix the batch of the trace."""
    if expression(size).free_symbols:
        raise UnsupportedOperatorError("a size", f"{size} depends on the batch where a fixed size is needed")
    return int(size)


class Value(NamedTuple):
    """A tensor of the graph: its name, its shape (with symbolic sizes for the batch) and its dtype."""

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    def static(self, *axes: int) -> tuple[int, ...]:
        """The sizes along `axes`, which must not depend on the batch."""
        return tuple(fixed(self.shape[a]) for a in axes)


class Mask(NamedTuple):
    """A random graph input: True with probability `keep`, drawn by the runner."""

    name: str
    shape: tuple[Dim, ...]
    keep: float


class GraphBuilder:
    """Collects nodes in the order of execution. `batch_of` is a graph input whose first dimension is the batch;
    `derived` says that another will derive its gradients (`exporters.ort_training`), which not all operators stand;
    `forms` are those of the target."""

    def __init__(self, batch_of: str, *, derived: bool = False, forms: Forms = CPU) -> None:
        self.derived = derived
        self.forms = forms
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.masks: list[Mask] = []
        self.origins: dict[str, str] = {}  # node -> the operator that it stands for, or is a part of
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._numbers: dict[tuple[sympy.Expr, torch.dtype], str] = {}
        self._results: dict[str, str] = {}
        self._unfolded: dict[tuple[str, torch.dtype], str] = {}
        self._batch_of = batch_of
        self._count = 0

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output and return the output's name. An empty input name is an absent input."""
        return self.multi(op_type, inputs, 1, **attributes)[0]

    def multi(self, op_type: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> tuple[str, ...]:
        """Append a node with several outputs and return their names."""
        names = tuple(self.fresh(op_type) for _ in range(outputs))
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op_type, list(inputs), list(names), name=names[0], **given))
        return names

    def rename(self, inner: str, outer: str) -> None:
        """Let value `inner` be the graph output `outer`: in the model, its node and its readers call it so.

        A graph input, a constant, and what already is an output under another name are copied to `outer`.
        """
        self._results[outer] = inner

    def fresh(self, stem: str) -> str:
        """A name not used before."""
        self._count += 1
        return f"{stem.lower()}_{self._count}"

    def constant(self, array: np.ndarray[Any, np.dtype[Any]]) -> str:
        """A constant tensor; equal constants share one initializer."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("const")
            self._constants[key] = name
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> str:
        """A 1-D int64 constant, as shapes and axes are."""
        return self.constant(np.asarray(values, dtype=np.int64).reshape(-1))

    def scalar(self, value: Scalar, dtype: torch.dtype) -> str:
        """A number as a () tensor; one that depends on the batch is computed in the graph."""
        formula = expression(value)
        if formula.free_symbols:
            return self._number(formula, dtype)
        return self.constant(np.asarray(value, dtype=NUMPY_DTYPES[dtype]))

    def shape(self, sizes: Sequence[Dim]) -> str:
        """A shape as a 1-D int64 tensor, computed in the graph where it depends on the batch."""
        if all(not expression(s).free_symbols for s in sizes):
            return self.ints([int(s) for s in sizes])
        parts = [self.op("Reshape", self.scalar(s, torch.int64), self.ints([1])) for s in sizes]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, value: str, sizes: Sequence[Dim]) -> str:
        """Reshape; the one size that depends on the batch is inferred (-1) by the runtime."""
        symbolic = [i for i, s in enumerate(sizes) if expression(s).free_symbols]
        if len(symbolic) > 1:
            return self.op("Reshape", value, self.shape(sizes))
        return self.op("Reshape", value, self.ints([-1 if i in symbolic else int(s) for i, s in enumerate(sizes)]))

    def filled(self, value: Scalar, sizes: Sequence[Dim], dtype: torch.dtype) -> str:
        """A tensor that is one number everywhere; not a constant of its size, where the target would keep that."""
        number = self.scalar(value, dtype)
        size = expression(math.prod(sizes))
        large = bool(size.free_symbols) or size > LARGEST_FOLDED
        if self.forms.fills == "computed" and self._batch_of and large:
            number = self._computed(number, dtype)
        return self.op("Expand", number, self.shape(sizes))

    def _computed(self, number: str, dtype: torch.dtype) -> str:
        """A number that is known, as a value that depends on an input: no number is less than itself."""
        if (number, dtype) not in self._unfolded:
            first = self.op("Gather", self.op("Reshape", self._batch_of, self.ints([-1])), self.ints([0]))
            zero = self.cast(self.op("Less", first, first), torch.bool, dtype)
            self._unfolded[number, dtype] = self.op("Or" if dtype == torch.bool else "Add", zero, number)
        return self._unfolded[number, dtype]

    def mask(self, shape: tuple[Dim, ...], keep: float) -> str:
        """A new random input of the graph, dtype bool."""
        self.masks.append(Mask(f"rand/{len(self.masks)}", shape, keep))
        return self.masks[-1].name

    def cast(self, value: str, source: torch.dtype, target: torch.dtype) -> str:
        """`value` as dtype `target`; nothing where it already is.

        Raises:
            UnsupportedOperatorError: no graph of a bundle has this type.
        """
        if target not in ONNX_DTYPES:
            raise UnsupportedOperatorError("aten._to_copy.default", f"to {target}")
        return value if source == target else self.op("Cast", value, to=ONNX_DTYPES[target])

    def slice(
        self,
        value: str,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> str:
        """Slice with constant bounds."""
        inputs = [value, self.ints(starts), self.ints(ends), self.ints(axes)]
        return self.op("Slice", *inputs, *([self.ints(steps)] if steps and set(steps) != {1} else []))

    def pad(self, value: str, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> str:
        """Constant padding of every axis; nothing where all amounts are zero."""
        if not any(before) and not any(after):
            return value
        amounts = self.ints([*before, *after])
        return self.op("Pad", value, amounts, *([self.scalar(fill, torch.float32)] if fill else []))

    def reduce(self, kind: str, value: str, axes: Sequence[int], keepdims: bool = False) -> str:
        """ReduceSum, ReduceMean, ... over `axes`."""
        return self.op(kind, value, self.ints(axes), keepdims=int(keepdims))

    def _number(self, formula: sympy.Expr, dtype: torch.dtype) -> str:
        if (formula, dtype) not in self._numbers:
            self._numbers[formula, dtype] = self._compute(formula, dtype)
        return self._numbers[formula, dtype]

    def _compute(self, formula: sympy.Expr, dtype: torch.dtype) -> str:
        """Evaluate a polynomial (with quotients) of the batch in the graph."""
        if formula.is_Symbol:
            size = self.op("Shape", self._batch_of, start=0, end=1)
            number = self.op("Reshape", size, self.constant(np.zeros(0, dtype=np.int64)))
            return self.cast(number, torch.int64, dtype)
        if formula.is_number:
            return self.constant(np.asarray(float(formula)).astype(NUMPY_DTYPES[dtype]))
        if (
            formula.func.__name__ in ("ToFloat", "IntTrueDiv", "FloatTrueDiv", "FloorDiv", "CleanDiv")
            or formula.is_Add
            or formula.is_Mul
        ):
            parts = [self._number(a, dtype) for a in formula.args]
            kind = "Add" if formula.is_Add else "Mul" if formula.is_Mul else "Div"
            result = parts[0]
            for part in parts[1:]:
                result = self.op(kind, result, part)
            return result
        if formula.is_Pow and formula.exp.is_integer:
            base = self._number(formula.base, dtype)
            return self.op("Pow", base, self.constant(np.asarray(int(formula.exp)).astype(NUMPY_DTYPES[dtype])))
        raise UnsupportedOperatorError("a size", f"{formula} depends on the batch in a way that is not supported")

    def _named(self) -> list[onnx.NodeProto]:
        """The nodes with the results under their outer names, then the copies."""
        made = {name for node in self.nodes for name in node.output}
        names: dict[str, str] = {}
        copies = []
        for outer, inner in self._results.items():
            if inner in made and inner not in names:
                names[inner] = outer
            else:
                copies.append(helper.make_node("Identity", [names.get(inner, inner)], [outer], name=outer))
        return [*(_renamed(node, names) for node in self.nodes), *copies]

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], name: str
    ) -> onnx.ModelProto:
        """The finished model; nodes and constants that no output needs are left out."""
        needed = {o.name for o in outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self._named()):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        constants = [tensor for key, tensor in self.initializers.items() if key in needed]
        graph = helper.make_graph(kept[::-1], name, list(inputs), list(outputs), initializer=constants)
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="edgelocal")


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """The node with other names for some values, a copy where there are any; its own name stays."""
    if names.keys().isdisjoint((*node.input, *node.output)):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


def value_info(name: str, shape: Sequence[int | str], dtype: torch.dtype) -> onnx.ValueInfoProto:
    """Type and shape of a graph input or output; strings are symbolic sizes."""
    return helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], list(shape))
