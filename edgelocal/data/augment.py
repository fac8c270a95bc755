"""Randomness as a function of counters, and what is built on it: order of samples, augmentation, dropout masks.

No generator is carried along and none of numpy's is used, so a resumed run, another numpy and another batch size all
see the same numbers. The base is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014). Its output number i for seed s is a pure function of both, modulo 2^64:

    out(s, i) = mix(s + (i + 1) * 0x9E3779B97F4A7C15)
    mix(z):  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z ^ z >> 31

Several counters are folded, each output being the seed of the next: draw(s, a, b) = out(out(out(s, stream), a), b).
A stream is a number that keeps two uses of the same seed and counters apart.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from edgelocal.bundle.spec import AugmentSpec
from edgelocal.errors import UsageError

Words: TypeAlias = npt.NDArray[np.uint64]
Counter: TypeAlias = int | npt.NDArray[np.integer[Any]]
Scalar = TypeVar("Scalar", bound=np.generic)

# Streams of this module. A number once given stays: runs of older versions must resume with the same bits.
ORDER, SHIFT_Y, SHIFT_X, FLIP, MASK = range(1, 6)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_BLOCK = 1 << 14  # words hashed at a time: the temporaries (128 KiB each) stay in the second-level cache
_PAD_MODES = {"reflect": "reflect", "zero": "constant"}


def splitmix64(seed: Counter, index: Counter) -> Words:
    """Output number `index` (from 0) of splitmix64 seeded with `seed`; both broadcast; uint64."""
    with np.errstate(over="ignore"):  # numpy warns of wrapping for scalars only; wrapping is the arithmetic meant here
        z = _words(index) + np.uint64(1)
        z = z * _GAMMA + _words(seed)
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return np.asarray(z ^ (z >> np.uint64(31)))


def draw(seed: int, *counters: Counter, stream: int) -> Words:
    """64 random bits for each combination of counters: shape of the broadcast counters, uint64."""
    key = splitmix64(seed, stream)
    for counter in counters:
        key = splitmix64(key, counter)
    return key


def uniform(seed: int, *counters: Counter, stream: int) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1), multiples of 2^-53: the upper 53 bits of `draw`."""
    return np.asarray((draw(seed, *counters, stream=stream) >> np.uint64(11)) * 2.0**-53)


def integers(bound: int, seed: int, *counters: Counter, stream: int) -> npt.NDArray[np.int64]:
    """Integers in [0, bound), bound in 1..2^32: floor(u * bound / 2^32), u the upper 32 bits of `draw`.

    The probabilities of two values differ by less than 2^-32.
    """
    if not 1 <= bound <= 1 << 32:
        raise UsageError(f"a random integer below {bound} was asked for; the bound must be in 1..2^32")
    upper = draw(seed, *counters, stream=stream) >> np.uint64(32)
    return np.asarray((upper * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def stream_of(name: str) -> int:
    """A stream number for a name, the same on every machine: the first 8 bytes of its sha256, little endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of n samples in an epoch: (n,) int64. Samples sorted by their random word; needs about 40 n bytes."""
    return np.argsort(draw(seed, epoch, np.arange(n), stream=ORDER), kind="stable").astype(np.int64, copy=False)


def augment(
    images: npt.NDArray[Scalar], samples: npt.NDArray[np.int64], *, spec: AugmentSpec, seed: int, epoch: int
) -> npt.NDArray[Scalar]:
    """Pad by `spec.pad` pixels, crop back to the size at a random place, mirror left-right with probability 1/2.

    What happens to a sample depends on (seed, epoch, sample id) only, never on the batch it is in. Peak memory above
    the input: the padded batch and two batches.

    Args:
        images: (k, C, H, W) of any dtype, before normalisation, so that zero padding is black.
        samples: (k,) ids of the samples.

    Returns:
        Same shape and dtype; `images` itself where there is nothing to do.

    Raises:
        UsageError: the samples are no images, or the padding does not suit them.
    """
    if not spec.pad and not spec.flip:
        return images
    _check(images.shape, spec)
    if spec.pad:
        images = _shift(images, samples, spec, seed, epoch)
    if spec.flip:
        mirrored = integers(2, seed, epoch, samples, stream=FLIP).astype(np.bool_)
        images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    return images


def bernoulli_mask(shape: tuple[int, ...], keep: float, seed: int, step: int, stream: int) -> npt.NDArray[np.bool_]:
    """A dropout mask: `shape`, bool, each element True with probability `keep` (to a multiple of 2^-32).

    Elements 2i and 2i + 1 in row-major order are the lower and upper half of draw(seed, stream, step, i), True where
    below keep * 2^32. Memory: one byte an element and some 512 KiB.

    Raises:
        UsageError: `keep` is no probability.
    """
    if not 0.0 <= keep <= 1.0:
        raise UsageError(f"a mask keeps elements with probability {keep}; expected a number in 0..1")
    count = math.prod(shape)
    threshold = np.uint64(round(keep * 2.0**32))
    mask = np.empty(count + count % 2, dtype=np.bool_)
    key = draw(seed, stream, step, stream=MASK)
    for start in range(0, count, 2 * _MASK_BLOCK):
        stop = min(start + 2 * _MASK_BLOCK, len(mask))
        words = splitmix64(key, np.arange(start // 2, stop // 2, dtype=np.uint64))
        np.less(words.astype("<u8", copy=False).view("<u4"), threshold, out=mask[start:stop])
    return mask[:count].reshape(shape)


def _words(value: Counter) -> Words:
    """Integers modulo 2^64."""
    if isinstance(value, int):
        return np.asarray(value & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return value.astype(np.uint64, copy=False)


def _shift(
    images: npt.NDArray[Scalar], samples: npt.NDArray[np.int64], spec: AugmentSpec, seed: int, epoch: int
) -> npt.NDArray[Scalar]:
    """Pad and crop: a crop is one of the (2 pad + 1)^2 windows of the padded image."""
    pad = spec.pad
    down = integers(2 * pad + 1, seed, epoch, samples, stream=SHIFT_Y)
    right = integers(2 * pad + 1, seed, epoch, samples, stream=SHIFT_X)
    mode: Any = _PAD_MODES[spec.mode]
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode=mode)
    windows = sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    return np.asarray(windows[np.arange(len(images)), :, down, right])


def _check(shape: tuple[int, ...], spec: AugmentSpec) -> None:
    if len(shape) != 4:
        raise UsageError(
            f"augmentation is for images (channels, height, width), but a sample has shape {shape[1:]}; train "
            "without augmentation, or export the bundle with pad 0 and no flip"
        )
    if spec.pad and spec.mode not in _PAD_MODES:
        raise UsageError(f"the bundle asks for padding mode {spec.mode!r}, expected one of {sorted(_PAD_MODES)}")
    if spec.pad < 0 or (spec.mode == "reflect" and spec.pad >= min(shape[2:])):
        raise UsageError(
            f"images of {shape[2]}x{shape[3]} cannot be padded by {spec.pad} pixels ({spec.mode}); expected 0 to less "
            "than the smaller side: export the bundle with a smaller pad"
        )
