"""What a training run is asked to do: plain values, checked in one place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelocal.bundle.spec import Manifest
from edgelocal.errors import UsageError
from edgelocal.training.schedule import SCHEDULES, trains_nothing

FLOAT32_MAX = float(np.finfo(np.float32).max)
TRAINING_SCHEDULES = ("interleaved", "sequential")
CACHES = ("off", "float32", "float16")
PORTABLE, ORT_TRAINING = "portable", "ort-training"


@dataclass(frozen=True)
class TrainConfig:
    """The settings that decide the bits of a run, together with the bundle, the data and the runtime.

    `hyper` overrides the optimizer's hyper-parameters; `cache` is the precision in which
    the outputs of frozen blocks are kept on disk, or off; `runtime` says whether gradients come from the bundle's step
    graphs or from its artifacts for ONNX Runtime's training.
    """

    epochs: int
    batch: int
    lr: float
    lr_schedule: str
    warmup_epochs: int
    schedule: str
    seed: int
    augment: bool
    cache: str
    hyper: dict[str, float]
    runtime: str = PORTABLE

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError for the first value that cannot be used with the bundle."""
        for name, low in (("epochs", 1), ("batch", 1), ("warmup_epochs", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least {low}")
        if not 0 <= self.lr <= FLOAT32_MAX:
            raise UsageError(f"lr is {self.lr}, expected a number of at least 0 that fits 32 bits")
        for name, value in self.hyper.items():
            if not abs(value) <= FLOAT32_MAX:
                raise UsageError(f"--hyper {name} is {value}, expected a number that fits 32 bits")
        _one_of("schedule", self.schedule, TRAINING_SCHEDULES)
        _one_of("lr schedule", self.lr_schedule, SCHEDULES)
        if trains_nothing(self.lr_schedule, self.lr, self.epochs, self.warmup_epochs):
            raise UsageError(
                f"the {self.lr_schedule} schedule ends at a learning rate of 0, which with epochs {self.epochs} is the "
                "rate of every step: give more --epochs, --lr-schedule constant, or --warmup-epochs 1"
            )
        unknown = sorted(set(self.hyper) - set(manifest.optimizer.hyper))
        if unknown:
            has = ", ".join(sorted(manifest.optimizer.hyper))
            raise UsageError(f"{manifest.optimizer.name} has no hyper-parameter {unknown[0]!r}; it has {has}")
        _one_of("cache", self.cache, CACHES)
        if self.cache != "off" and self.schedule != "sequential":
            raise UsageError("--cache keeps outputs of frozen blocks, which only --schedule sequential has")
        if self.cache != "off" and self.augment:
            raise UsageError("--cache would freeze each sample's augmentation: add --no-augment, or leave --cache out")

    def all_hyper(self, manifest: Manifest) -> dict[str, float]:
        """The optimizer's hyper-parameters with the overrides."""
        return {**manifest.optimizer.hyper, **self.hyper}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return dataclasses.asdict(self)

    def fingerprint(self, bundle_digest: str, data_digest: str) -> str:
        """What a checkpoint must agree with to be continued: these settings, the bundle and the data."""
        own = self.as_dict()
        if self.runtime == PORTABLE:
            del own["runtime"]  # runs from before there was another have no word of it
        payload = json.dumps([own, bundle_digest, data_digest], sort_keys=True)
        return hashlib.sha256(payload.encode()).hexdigest()


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"there is no {name} {value!r}; choose one of {', '.join(known)}")
