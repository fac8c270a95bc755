"""Loss and accuracy of a (partly) trained network, block by block in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgelocal.bundle.spec import Manifest
from edgelocal.data.formats.base import Dataset, Indices
from edgelocal.data.pipeline import batches, prepare
from edgelocal.runtime.block import Block
from edgelocal.runtime.tensor import Tensor
from edgelocal.training.feed import Feed
from edgelocal.training.scores import Score, score


def evaluate(
    blocks: Sequence[Block],
    data: Dataset,
    manifest: Manifest,
    batch: int,
    *,
    exits: bool,
    after_batch: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Scores of the network up to the last of `blocks`, through its head; with `exits` of every block's head.

    One batch at a time passes through all blocks, so memory does not grow with the data. `after_batch` may raise to
    end it early.
    """
    scores = [Score() for _ in blocks]
    place = blocks[0].place

    def sample(indices: Indices) -> Tensor:
        images = data.read(indices)
        return place.of(prepare(images, indices, input=manifest.input, augment=None, seed=0, epoch=0))

    with Feed(batches(len(data), batch, 0, 0, shuffle=False), sample, ahead=place.device is not None) as feed:
        for indices in feed:
            h, y = feed.take(), np.asarray(data.labels[indices])
            for number, block in enumerate(blocks):
                h = block.forward(h)
                if exits or number == len(blocks) - 1:
                    loss, right = score(block.head(h).array(), y, manifest.task)
                    scores[number].add(len(indices), loss, right)
            after_batch()
    return [s.result(manifest.task) for s in (scores if exits else scores[-1:])]
