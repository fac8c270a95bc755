"""Randomness by counters, and augmentation against a pixel-by-pixel reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelocal.bundle.spec import AugmentSpec
from edgelocal.data.augment import (
    FLIP,
    MASK,
    ORDER,
    SHIFT_X,
    SHIFT_Y,
    augment,
    bernoulli_mask,
    draw,
    integers,
    permutation,
    splitmix64,
    stream_of,
    uniform,
)
from edgelocal.errors import UsageError

WORD = 2**64 - 1
WORDS = st.integers(0, WORD)


def out(seed: int, index: int) -> int:
    """splitmix64 in Python's integers."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & WORD
    return z ^ z >> 31


def fold(seed: int, *counters: int) -> int:
    for counter in counters:
        seed = out(seed, counter)
    return seed


def test_published_vectors_of_splitmix64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, np.arange(5)).tolist() == published
    assert [int(splitmix64(1234567, i)) for i in range(5)] == published


@given(WORDS, WORDS, st.lists(WORDS, min_size=1, max_size=4), WORDS)
def test_draw_folds_the_counters(seed: int, first: int, last: list[int], stream: int) -> None:
    words = draw(seed, first, np.asarray(last, dtype=np.uint64), stream=stream)
    assert words.dtype == np.uint64
    assert words.tolist() == [fold(seed, stream, first, counter) for counter in last]


def test_a_negative_seed_is_taken_modulo_two_to_the_64() -> None:
    assert int(draw(-1, 5, stream=1)) == int(draw(WORD, 5, stream=1)) == fold(WORD, 1, 5)


@given(WORDS, st.integers(1, 1 << 32))
def test_uniform_and_integers_are_the_upper_bits(seed: int, bound: int) -> None:
    word = fold(seed, 9, 3)
    assert float(uniform(seed, 3, stream=9)) == (word >> 11) / 2**53
    assert int(integers(bound, seed, 3, stream=9)) == (word >> 32) * bound >> 32


def test_uniform_is_uniform() -> None:
    counts, _ = np.histogram(uniform(3, np.arange(100_000), stream=1), bins=20, range=(0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("bound", [0, -1, (1 << 32) + 1])
def test_integers_refuse_a_bound_out_of_range(bound: int) -> None:
    with pytest.raises(UsageError, match=r"below .* expected|must be in 1..2\^32"):
        integers(bound, 0, stream=1)


def test_stream_of_a_name_never_changes() -> None:
    assert stream_of("rand/drop1") != stream_of("rand/drop2")
    assert stream_of("abc") == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "little")  # FIPS 180-2


@given(st.integers(0, 300), WORDS, st.integers(0, 100))
def test_permutation_sorts_by_random_word(n: int, seed: int, epoch: int) -> None:
    expected = sorted(range(n), key=lambda i: fold(seed, ORDER, epoch, i))
    assert permutation(n, seed, epoch).tolist() == expected


def test_permutation_changes_with_seed_and_epoch() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def mirror_index(i: int, size: int) -> int:
    """Reflection without repeating the border, for i in 1 - size .. 2 size - 2."""
    return -i if i < 0 else 2 * (size - 1) - i if i >= size else i


def slow_augment(image: np.ndarray, sample: int, spec: AugmentSpec, seed: int, epoch: int) -> np.ndarray:
    """One pixel after the other, from the definition."""
    span = 2 * spec.pad + 1
    down = (fold(seed, SHIFT_Y, epoch, sample) >> 32) * span >> 32
    right = (fold(seed, SHIFT_X, epoch, sample) >> 32) * span >> 32
    mirrored = spec.flip and fold(seed, FLIP, epoch, sample) >> 63
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for c, y, x in np.ndindex(channels, height, width):
        row, column = y + down - spec.pad, x + right - spec.pad
        if spec.mode == "reflect":
            row, column = mirror_index(row, height), mirror_index(column, width)
        if 0 <= row < height and 0 <= column < width:
            result[c, y, width - 1 - x if mirrored else x] = image[c, row, column]
    return result


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(4, 7),
    st.integers(4, 7),
    st.integers(0, 3),
    st.sampled_from(["reflect", "zero"]),
    st.booleans(),
    st.lists(st.integers(0, 1 << 40), max_size=5),
    WORDS,
    st.sampled_from([np.uint8, np.float32]),
)
def test_augment_equals_the_pixel_reference(
    channels: int, height: int, width: int, pad: int, mode: str, flip: bool, samples: list[int], seed: int, dtype: type
) -> None:
    shape = (len(samples), channels, height, width)
    images = (1 + np.arange(np.prod(shape)) % 250).reshape(shape).astype(dtype)
    spec = AugmentSpec(pad, mode, flip)
    result = augment(images, np.asarray(samples, dtype=np.int64), spec=spec, seed=seed, epoch=3)
    assert result.dtype == dtype
    assert result.shape == shape
    for image, sample, found in zip(images, samples, result, strict=True):
        np.testing.assert_array_equal(found, slow_augment(image, sample, spec, seed, 3))


def test_augment_does_not_depend_on_the_batch() -> None:
    images = np.random.default_rng(0).random((9, 3, 8, 8), dtype=np.float32)
    samples, spec = np.arange(100, 109), AugmentSpec(2, "reflect", True)
    whole = augment(images, samples, spec=spec, seed=1, epoch=2)
    backwards = augment(images[::-1], samples[::-1], spec=spec, seed=1, epoch=2)[::-1]
    single = [augment(images[i : i + 1], samples[i : i + 1], spec=spec, seed=1, epoch=2)[0] for i in range(9)]
    np.testing.assert_array_equal(whole, backwards)
    np.testing.assert_array_equal(whole, np.stack(single))
    assert not np.array_equal(whole, augment(images, samples, spec=spec, seed=1, epoch=3))


def test_augment_without_work_returns_its_input_for_any_shape() -> None:
    features = np.ones((2, 5), dtype=np.float32)
    assert augment(features, np.arange(2), spec=AugmentSpec(0, "zero", False), seed=0, epoch=0) is features


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((2, 5), AugmentSpec(1, "zero", True), r"shape \(5,\); train without augmentation"),
        ((2, 1, 4, 4), AugmentSpec(4, "reflect", False), "4x4 cannot be padded by 4 pixels"),
        ((2, 1, 4, 4), AugmentSpec(-1, "zero", False), "cannot be padded by -1 pixels"),
        ((2, 1, 4, 4), AugmentSpec(1, "wrap", False), "padding mode 'wrap', expected one of"),
    ],
)
def test_augment_refuses_what_does_not_suit(shape: tuple[int, ...], spec: AugmentSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        augment(np.zeros(shape, dtype=np.uint8), np.arange(2), spec=spec, seed=0, epoch=0)


@given(st.lists(st.integers(0, 5), max_size=3), st.floats(0, 1), WORDS, st.integers(0, 99), WORDS)
def test_mask_equals_the_definition(shape: list[int], keep: float, seed: int, step: int, stream: int) -> None:
    mask = bernoulli_mask(tuple(shape), keep, seed, step, stream)
    words = [fold(seed, MASK, stream, step, i // 2) >> 32 * (i % 2) & 0xFFFFFFFF for i in range(mask.size)]
    assert mask.shape == tuple(shape)
    assert mask.ravel().tolist() == [word < round(keep * 2**32) for word in words]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_mask_over_many_blocks_keeps_the_right_share(keep: float) -> None:
    mask = bernoulli_mask((300, 1001), keep, 7, 5, stream_of("rand/drop"))
    deviation = (keep * (1 - keep) / mask.size) ** 0.5
    assert abs(mask.mean() - keep) <= 4 * deviation
    assert np.array_equal(mask.ravel()[:65_537], bernoulli_mask((65_537,), keep, 7, 5, stream_of("rand/drop")))


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_mask_refuses_what_is_no_probability(keep: float) -> None:
    with pytest.raises(UsageError, match=r"expected a number in 0\.\.1"):
        bernoulli_mask((2,), keep, 0, 0, 0)
