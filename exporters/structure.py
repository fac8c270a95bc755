"""When two modules are the same but for the values of their tensors.

Most blocks of a deep network differ in nothing else, and tracing is nearly all the time of an export: equal structures
are traced once.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


def structure(value: Any) -> bytes | None:
    """The value pickled with every tensor replaced by its shape, dtype and place; None where it cannot be pickled.

    Equal bytes mean equal code and settings. Equal structures may give different bytes: that only costs time.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # a lambda or a class defined inside a function
        return None
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Tensors by what a trace sees of them; the place tells shared tensors from equal ones."""
        if not isinstance(value, torch.Tensor):
            return None
        place = self._places.setdefault(id(value), len(self._places))
        return place, type(value).__name__, tuple(value.shape), str(value.dtype), value.requires_grad
