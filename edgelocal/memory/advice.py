"""Where back-propagation would be the better choice than the partition that was chosen, said plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Point(Protocol):
    """A way to train the network, as in `FrontierSpec`."""

    @property
    def kind(self) -> str:
        """ "partition", "bp", "checkpointing" or another one."""

    @property
    def working_set_bytes(self) -> int:
        """Bytes above the idle process."""

    @property
    def training_macs(self) -> int:
        """Of a sample."""

    @property
    def chosen(self) -> bool | None:
        """Whether it is the one of the bundle."""


def advice_on(points: Sequence[Point]) -> str:
    """One sentence on the chosen point beside plain and checkpointed back-propagation; "" if one of them is not there.

    The working set of checkpointed back-propagation is always an estimate.
    """
    chosen = next((p for p in points if p.chosen), None)
    plain = next((p for p in points if p.kind == "bp"), None)
    kept = next((p for p in points if p.kind == "checkpointing"), None)
    if chosen is None or plain is None or kept is None:
        return ""
    if plain.working_set_bytes <= chosen.working_set_bytes and plain.training_macs < chosen.training_macs:
        return (
            "plain back-propagation would need no more memory and less compute than the chosen partition: "
            "--rule bp is the better choice here"
        )
    times = kept.working_set_bytes / max(chosen.working_set_bytes, 1)
    if kept.training_macs < chosen.training_macs:
        if times <= 1:
            return (
                "by estimate, checkpointed back-propagation would need no more memory and less compute than the chosen "
                "partition, and it learns as plain back-propagation does: on a device that runs PyTorch it is the "
                "better choice here"
            )
        return (
            "by estimate, checkpointed back-propagation would need less compute, but "
            f"{times:.2f} times the memory of the chosen partition"
        )
    if times < 1:
        return (
            "by estimate, checkpointed back-propagation would need "
            f"{times:.2f} times the memory of the chosen partition, for more compute"
        )
    return (
        "by estimate, checkpointed back-propagation would need no less memory and no less compute than what was chosen"
    )
