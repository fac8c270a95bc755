"""Labels as found -> labels as the step graph takes them, with every check on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgelocal.bundle.spec import TaskSpec
from edgelocal.data.formats.base import Labels
from edgelocal.errors import DataError


def class_labels(ids: npt.NDArray[Any], task: TaskSpec, source: str) -> Labels:
    """Class ids, (n,) of any integer dtype -> (n,) int64 for cross_entropy, one-hot (n, classes) float32 otherwise.

    Raises:
        DataError: an id is not in 0..classes-1; names the first such sample.
    """
    bad = np.flatnonzero((ids < 0) | (ids >= task.classes))
    if len(bad):
        raise DataError(
            f"{source}: sample {bad[0]} has label {ids[bad[0]]}, expected 0 to {task.classes - 1} "
            f"({len(bad)} labels are out of range): correct the labels, or export with more classes"
        )
    if task.loss == "cross_entropy":
        return ids.astype(np.int64)
    targets = np.zeros((len(ids), task.classes), dtype=np.float32)
    targets[np.arange(len(ids)), ids.astype(np.int64)] = 1.0
    return targets


def array_labels(y: npt.NDArray[Any], count: int, task: TaskSpec, source: str) -> Labels:
    """A label array for `count` samples -> labels.

    Accepted for cross_entropy: integers, (n,) or (n, 1). For bce and mse: numbers, (n, classes), or (n,) where
    classes is 1; for bce in 0..1.

    Raises:
        DataError: another count, shape or dtype, or a value out of range.
    """
    if y.ndim == 0 or len(y) != count:
        found = "a single value" if y.ndim == 0 else f"{len(y)} labels"
        raise DataError(f"{source}: {found} for {count} samples; expected one label a sample, in the same order")
    width = 1 if task.loss == "cross_entropy" else task.classes
    if y.shape != (count, width) and not (y.ndim == 1 and width == 1):
        raise DataError(f"{source}: labels of shape {y.shape} for loss {task.loss}, expected {(count, width)}")
    if task.loss == "cross_entropy":
        return class_labels(_of_kind(y, "iu", "integers (class ids)", source).reshape(count), task, source)
    return _targets(_of_kind(y, "biuf", "numbers", source).reshape(count, width), task, source)


def _of_kind(y: npt.NDArray[Any], kinds: str, expected: str, source: str) -> npt.NDArray[Any]:
    if y.dtype.kind not in kinds:
        raise DataError(f"{source}: labels are {y.dtype}, expected {expected}: convert them with numpy's astype")
    return y


def _targets(y: npt.NDArray[Any], task: TaskSpec, source: str) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows float32 becomes Inf and is refused below
        targets = y.astype(np.float32)
    right = np.isfinite(targets)
    expected = "a finite number"
    if task.loss == "bce":
        right &= (targets >= 0) & (targets <= 1)
        expected = "a number in 0..1"
    bad = np.flatnonzero(~right.all(axis=1))
    if len(bad):
        raise DataError(f"{source}: label of sample {bad[0]} is {y[bad[0]].tolist()}, expected {expected}: correct it")
    return targets
