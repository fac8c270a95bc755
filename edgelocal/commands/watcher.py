"""Ties the training loop to the run folder, the display and the signals."""

from __future__ import annotations

import threading
from typing import Any

from edgelocal.commands.progress import Display
from edgelocal.commands.train_request import TrainRequest
from edgelocal.training.run import RunFolder
from edgelocal.training.trainer import Trainer


class Watcher:
    """Ties the loop to the run folder, the display and the signals.

    With `record` it commits after the first step: a bound of micro-batches that has served is not lost if the run is
    killed, and one that was too large is never recorded.
    """

    def __init__(
        self, folder: RunFolder, display: Display, request: TrainRequest, stop: threading.Event, *, record: bool
    ) -> None:
        self.folder = folder
        self.display = display
        self.request = request
        self.stop = stop
        self._record = record

    def step(self, trainer: Trainer) -> None:
        self.display.step(trainer)
        if self._record or self.folder.due(trainer, self.request.checkpoint_steps, self.request.checkpoint_s):
            self.folder.commit(trainer)
            self._record = False

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.folder.add_metrics(record)
        self.display.epoch(trainer, record)

    def should_stop(self) -> bool:
        return self.stop.is_set()

    def commit(self, trainer: Trainer) -> None:
        self.folder.commit(trainer)
