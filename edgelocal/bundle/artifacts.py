"""The names that ONNX Runtime's training artifacts give to the tensors of a block.

Parameters and buffers are called as in the bundle (`param/...`, `buf/...`), and so are input, targets and masks. The
gradient of a parameter is added to a buffer of its own, or overwrites it where `RESET` is true.
"""

from __future__ import annotations

RESET = "lazy_reset_grad"


def gradient_buffer(sums: str) -> str:
    """Name in the artifacts of what the bundle calls `acc/<parameter>`."""
    return f"param/{sums.partition('/')[2]}_grad.accumulation.buffer"
