"""Networks from outside the zoo: reference -> module -> units.

A module tells its units in one of three ways.
- It is an `nn.Sequential`: every child with parameters opens a unit; parameter-free and purely normalising children
  join the unit before them (leading ones the first unit). The last child that opens one is, with all that follows,
  the head.
- It has a method `edgelocal_units()` that returns a list of (name, module), the head last.
- Otherwise it is one unit, and only one block (rule bp) is possible.

A fresh unit for auxiliary networks is conv3x3-BN-ReLU behind maps (N, C, H, W), Linear-ReLU behind features (N, F), and
behind tokens (N, T, D) a re-initialised copy of the unit itself.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from edgelocal.errors import ExportError
from edgelocal.exporters.guest import network_errors
from edgelocal.exporters.units import Fresh, GlobalMean, Network, Unit, check_dtypes, output_shapes, pooled_linear
from edgelocal.exporters.zoo.layers import conv_bn_relu, initialise

Pieces = list[tuple[str, nn.Module]]

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.LayerNorm,
    nn.RMSNorm,
)


def build(reference: str, input_shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32) -> Network:
    """`package.module:callable` or `file.py:callable` -> Network.

    A package or module is looked for in the current folder first, as by `python -m`. The callable is given what its
    signature accepts of `classes=` and `input_shape=`.

    Raises:
        ExportError: the reference leads nowhere, the callable fails, or its result is no usable module.
    """
    module = _call(_find(reference), reference, {"classes": classes, "input_shape": input_shape})
    return from_module(module, reference, input_shape, classes, dtype)


def from_module(
    module: nn.Module, name: str, input_shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32
) -> Network:
    """The module as units, as described above.

    Raises:
        ExportError: a tensor is not float32, `edgelocal_units` returns something else, or a piece does not run on the
            one before it.
    """
    check_dtypes(module, name)
    parts = _declared(module, name) or _children(module) or [("all", module), ("head", nn.Identity())]
    shapes = output_shapes([part for _, part in parts], input_shape, name, dtype)
    inputs = [input_shape, *shapes]
    units = tuple(
        Unit(label, part, _width(name, label, shape), _fresh_for(part, before, shape))
        for (label, part), before, shape in zip(parts[:-1], inputs, shapes, strict=False)
    )
    return Network(name, module, units, parts[-1][1], pooled_linear, input_shape, classes, input_dtype=dtype)


def _find(reference: str) -> Callable[..., Any]:
    place, colon, attribute = reference.rpartition(":")
    if not colon or not place or not attribute:
        raise ExportError(f"{reference!r} names no callable; write package.module:callable or file.py:callable")
    module = _import(place)
    found = getattr(module, attribute, None)
    if not callable(found):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ExportError(f"{place} has {what} under the name {attribute!r}, expected a callable that returns a module")
    function: Callable[..., Any] = found
    return function


def _import(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _load_file(Path(place))
        with _current_folder_first():
            return importlib.import_module(place)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"cannot import {place}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """What `python -m` puts on the import path and an installed command does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have tidied up itself
            sys.path.remove(folder)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExportError(f"cannot import {path}: there is no such file, seen from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(function: Callable[..., Any], reference: str, offered: dict[str, Any]) -> nn.Module:
    with network_errors(reference):
        result = function(**_accepted(function, offered))
    if not isinstance(result, nn.Module):
        raise ExportError(f"{reference} returned a {type(result).__name__}, expected a torch.nn.Module")
    return result


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _declared(module: nn.Module, name: str) -> Pieces | None:
    method = getattr(module, "edgelocal_units", None)
    if method is None:
        return None
    with network_errors(f"{name}: edgelocal_units"):
        parts = [(str(label), part) for label, part in method()]
    labels = {label for label, _ in parts}
    if len(parts) < 2 or len(labels) < len(parts) or not all(isinstance(part, nn.Module) for _, part in parts):
        raise ExportError(
            f"{name}: edgelocal_units returned {len(parts)} entries with {len(labels)} names, expected (name, module) "
            "for one unit or more and then the head, each name once"
        )
    return parts


def _children(module: nn.Module) -> Pieces | None:
    if not isinstance(module, nn.Sequential):
        return None
    groups: list[tuple[str, list[nn.Module]]] = []
    leading: list[nn.Module] = []
    # named_children() would leave out a child that occurs twice.
    children = [(n, m) for n, m in module.named_modules(remove_duplicate=False) if n and "." not in n]
    for label, child in children:
        if _opens_unit(child):
            groups.append((label, [*leading, child]))
            leading = []
        elif groups:
            groups[-1][1].append(child)
        else:
            leading.append(child)
    if len(groups) < 2:
        return None
    return [(label, group[0] if len(group) == 1 else nn.Sequential(*group)) for label, group in groups]


def _opens_unit(child: nn.Module) -> bool:
    return next(child.parameters(), None) is not None and not isinstance(child, _NORMS)


def _width(name: str, label: str, shape: tuple[int, ...]) -> int:
    if len(shape) > 3:
        raise ExportError(f"{name}: unit {label} puts out (N, {shape}), expected (N, C, H, W), (N, T, D) or (N, F)")
    return shape[-1] if len(shape) == 2 else shape[0]


def _fresh_for(module: nn.Module, before: tuple[int, ...], shape: tuple[int, ...]) -> Fresh:
    if len(shape) == 3:
        return _fresh_conv
    if len(shape) == 1:
        return _fresh_linear
    return partial(_fresh_copy, module, before == shape)


def _fresh_conv(inputs: int, width: int, stride: int) -> nn.Module:
    return initialise(conv_bn_relu(inputs, width, stride=stride))


def _fresh_linear(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(GlobalMean(), nn.Linear(inputs, width), nn.ReLU())


def _fresh_copy(module: nn.Module, keeps_shape: bool, inputs: int, width: int, stride: int) -> nn.Module:
    if not keeps_shape or inputs != width:
        raise ExportError(
            f"a {type(module).__name__} that changes the shape of its tokens cannot be copied into an auxiliary "
            f"network ({inputs} -> {width}); keep token units of one width, or use rule linear"
        )
    fresh = copy.deepcopy(module)
    for part in fresh.modules():
        reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
        if reset is not None:
            reset()
        elif next(part.parameters(recurse=False), None) is not None:
            raise ExportError(
                f"a {type(part).__name__} has parameters but no reset_parameters(), so no untrained copy of it can be "
                "made for an auxiliary network; give it that method, or use rule linear"
            )
    return fresh
