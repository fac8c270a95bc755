"""The memory of a training's process, on the host and on a device: its peaks, over time, and beside the budget."""

from __future__ import annotations

from edgelocal.errors import OverBudgetError
from edgelocal.machine.budget import format_size, peak_rss_bytes
from edgelocal.runtime.accelerator import Accelerator
from edgelocal.training.measures import BETWEEN, Timeline


class MemoryWatch:
    """Peaks in bytes, of host and `device` together: `process_peak_bytes` of the run, as far as it is known,
    `device_peak_bytes` of the device alone, since this began."""

    def __init__(self, budget_bytes: int | None, device: Accelerator | None) -> None:
        self.budget_bytes = budget_bytes
        self.process_peak_bytes = 0
        self.device_peak_bytes = 0
        self.timeline = Timeline()
        self._device = device
        self._device_bytes = 0  # at the last look
        self._step_peak = 0  # of the last step, from where on the system's meter was not set back
        self._own_peak = 0  # since this began

    def look_at_device(self) -> None:
        """Take what the process holds on the device into its peak; what its arena took it keeps."""
        if self._device is not None:
            self._device_bytes = self._device.meter.used_bytes()
            self.device_peak_bytes = max(self.device_peak_bytes, self._device_bytes)

    def add_step(self, host_peak_bytes: int, block: int) -> None:
        """Note the host's peak in a step of a block."""
        self._step_peak = host_peak_bytes + self._device_bytes
        self.timeline.add(self._step_peak, block)

    def note(self) -> None:
        """Take the peak since the last step into account."""
        peak = peak_rss_bytes() + self._device_bytes
        self._own_peak = max(self._own_peak, peak)
        self.process_peak_bytes = max(self.process_peak_bytes, peak)
        if peak > self._step_peak:  # what came after the step took more than it
            self.timeline.add(peak, BETWEEN)
            self._step_peak = peak

    def check(self) -> None:
        """Compare the peak with the budget.

        A peak from before, of larger micro-batches or under another budget, is only reported.

        Raises:
            OverBudgetError: it held more. What to do is for the caller to say, who may go on with smaller parts.
        """
        self.note()
        if self.budget_bytes is not None and self._own_peak > self.budget_bytes:
            raise OverBudgetError(
                f"the process held {format_size(self._own_peak)} at its peak, the budget is "
                f"{format_size(self.budget_bytes)}"
            )
