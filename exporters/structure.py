"""When two modules are the same but for the values of their tensors.

Most blocks of a deep network differ in nothing else, and tracing is nearly all the time of an export: equal structures
are traced once.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def structure(modules: Sequence[nn.Module | None]) -> bytes | None:
    """Modules pickled with every parameter and buffer replaced by its shape, dtype and place.

    Equal bytes mean equal code and settings, tensors in plain attributes included: those are constants of a graph.
    Equal structures may give different bytes, or None where one cannot be pickled: that only costs time.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, modules).dump(modules)
    except (pickle.PicklingError, AttributeError, TypeError):  # a lambda or a class defined inside a function
        return None
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, modules: Sequence[nn.Module | None]) -> None:
        super().__init__(buffer)
        present = [module for module in modules if module is not None]
        self._inputs = {id(t) for module in present for t in (*module.parameters(), *module.buffers())}
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Tensors by what a trace sees of them; the place tells shared tensors from equal ones."""
        if not isinstance(value, torch.Tensor):
            return None
        looks = type(value).__name__, tuple(value.shape), str(value.dtype), value.requires_grad
        if id(value) not in self._inputs:
            return *looks, value.detach().numpy().tobytes()
        return *looks, self._places.setdefault(id(value), len(self._places))
