"""The table of lowerings, filled by the modules of this package when they are imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgelocal.exporters.onnx_graph import UnsupportedOperatorError

__all__ = ["REGISTRY", "Lowering", "Result", "UnsupportedOperatorError", "lowers"]

Result = str | tuple[str | None, ...]
Lowering = Callable[..., Result]

REGISTRY: dict[Any, Lowering] = {}


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Register a lowering for the given ATen overloads."""

    def register(function: Lowering) -> Lowering:
        for target in targets:
            REGISTRY[target] = function
        return function

    return register
