"""Which images show nearly the same picture: saved anew, at another size, in another light, moved by a
pixel, or mirrored.

A hash of 64 bits says which may, and their pixels, at 32x32, whether they do. Of 1,500 images of
CIFAR-10 it finds those in JPEG quality 75 and 40 (all), 20 (99%), at twice and three quarters of their
size (all), at half of it (93%), 20% lighter or darker (all), with less contrast or colour (all), moved
by a pixel (95%), mirrored (all).
"""

from collections.abc import Callable
from itertools import compress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from convoy_service.artifacts.images import Pixels
from convoy_training.data.datasets import Track, in_threads

# How many of the bits may differ. In copies of the kinds above no more do in 99.8% (moved by a pixel:
# 95%), in other pairs of CIFAR-10 in 8 of a million.
_RADIUS = 12
# Of more candidates for an image the closest are looked at: where images are alike by nature, as
# drawings of digits are, it has hundreds.
_CANDIDATES = 4
# How well the details of two images correlate (what is left without a blur of 5x5), and the images.
# Without the former two clear skies would be the same. Of 100 pairs in CIFAR-10 that pass, looked at
# by eye, one or two are different pictures.
_SAME_DETAIL, _SAME_IMAGE = 0.65, 0.8
# Under this the detail is noise (root mean square, of 255).
_DETAIL = 1.0

# The lowest frequencies of a cosine transform but the mean, as (vertical, horizontal). Their signs are
# the hash, as in imagehash.phash, which would bring SciPy and PyWavelets for these lines. It is better
# than a hash of differences between neighbours (dhash): of JPEGs in quality 20 that has 96% in
# _RADIUS, and four times as many other pairs.
_FREQUENCIES = sorted(((v, h) for v in range(9) for h in range(9)), key=lambda f: (sum(f), f))[1:65]
# Mirrored, an image has the same but for the sign of those whose horizontal one is odd.
_MIRRORED = np.packbits([h % 2 == 1 for _, h in _FREQUENCIES]).view(np.uint64)[0]
_WAVES = np.cos(np.pi / 64 * np.outer(np.arange(9), 2 * np.arange(32) + 1)).astype(np.float32)
_PART = 256

_Grey = npt.NDArray[np.float32]


class Pair(NamedTuple):
    """Two images by their numbers, `one` less than `other`."""

    one: int
    other: int
    mirrored: bool


def near(small: Callable[[int], Pixels], count: int, asked: int, track: Track) -> list[Pair]:
    """Pairs of nearly the same images of `count`, the first of each among the first `asked`.

    `small` gives an image by its number, grey, at the size of `IDENTITY`. Of an image that is like
    many others not all pairs are given. Flat images, whose detail is noise, are in none.
    """
    grey = np.empty((count, 32, 32), np.uint8)

    def shrink(number: int) -> None:
        grey[number] = small(number)[..., 0]

    in_threads(shrink, range(count), track, "hashing images")
    hashes = np.empty(count, np.uint64)
    detailed = np.empty(count, bool)
    for start in range(0, count, _PART):
        part = grey[start : start + _PART].astype(np.float32)
        waves = _WAVES @ part @ _WAVES.T
        signs = np.stack([waves[:, v, h] > 0 for v, h in _FREQUENCIES], axis=1)
        hashes[start : start + _PART] = np.packbits(signs, axis=1).view(np.uint64)[:, 0]
        detailed[start : start + _PART] = np.square(_detail(part)).mean((1, 2)) >= _DETAIL**2
    numbers = np.flatnonzero(detailed)
    hashes = hashes[numbers]
    candidates: list[list[Pair]] = [[] for _ in range(np.searchsorted(numbers, asked))]

    # All pairs: 60,000 images have 1.8e9, which take 3 s on two cores. An index would be slow just
    # where many images are alike.
    def compare(row: int) -> None:
        apart = hashes[row + 1 :] ^ hashes[row]
        for mirrored in (False, True):
            bits = np.bitwise_count(apart ^ _MIRRORED if mirrored else apart)
            close = np.flatnonzero(bits <= _RADIUS)
            if len(close) > _CANDIDATES:
                close = close[np.argsort(bits[close], kind="stable")[:_CANDIDATES]]
            candidates[row] += [
                Pair(int(numbers[row]), int(numbers[row + 1 + at]), mirrored) for at in close
            ]

    in_threads(compare, range(len(candidates)), track, "comparing images")
    pairs = [pair for row in candidates for pair in row]
    same = np.zeros(len(pairs), bool)

    def verify(start: int) -> None:
        part = pairs[start : start + _PART]
        one = grey[[pair.one for pair in part]].astype(np.float32)
        other = grey[[pair.other for pair in part]].astype(np.float32)
        flipped = [pair.mirrored for pair in part]
        other[flipped] = other[flipped, :, ::-1]
        same[start : start + _PART] = _same(one, other)

    in_threads(verify, range(0, len(pairs), _PART), track, "comparing copies")
    return list(compress(pairs, same))


def _same(one: _Grey, other: _Grey) -> npt.NDArray[np.bool_]:
    """Which images of `one` and of `other`, grey `[N, 32, 32]`, show the same, in whatever light."""
    # Cut or scaled otherwise, they may lie a pixel apart.
    shifts = [
        np.s_[:, down : down + 26, right : right + 26] for down in range(3) for right in range(3)
    ]
    detail, others = _detail(one)[:, 1:-1, 1:-1], _detail(other)
    correlations = np.stack([_correlation(detail, others[shift]) for shift in shifts])
    best = correlations.argmax(axis=0)
    same: npt.NDArray[np.bool_] = correlations.max(axis=0) >= _SAME_DETAIL
    for at in np.flatnonzero(same):
        shifted = other[at : at + 1, 2:-2, 2:-2][shifts[best[at]]]
        images = _correlation(one[at : at + 1, 3:-3, 3:-3], shifted - shifted.mean())
        same[at] = images[0] >= _SAME_IMAGE
    return same


def _detail(grey: _Grey) -> _Grey:
    """What a blur of 5x5 takes from `[N, H, W]`: `[N, H - 4, W - 4]`."""
    side = grey.shape[1] - 4
    rows = np.sum([grey[:, at : at + side] for at in range(5)], axis=0)
    blurred = np.sum([rows[:, :, at : at + side] for at in range(5)], axis=0)
    detail: _Grey = grey[:, 2:-2, 2:-2] - blurred / np.float32(25)
    return detail


def _correlation(one: _Grey, other: _Grey) -> _Grey:
    """Of each image of the first with its partner in the second, `[N]`."""
    one = one - one.mean((1, 2), keepdims=True)
    size = one[0].size
    # As the first has no mean, that of the second takes no part.
    variance = _product(other, other) - other.sum((1, 2)) ** 2 / size
    correlation: _Grey = _product(one, other) / np.sqrt(
        np.maximum(_product(one, one) * variance, 1e-9)
    )
    return correlation


def _product(one: _Grey, other: _Grey) -> _Grey:
    product: _Grey = np.einsum("nij,nij->n", one, other)
    return product
