"""What the tools compute, held against the libraries that others compute it with.

They are for development alone, and no tool imports them. Without one, its tests are skipped.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from scenes import jpeg, marked, scene

from tools.intervals import fid, kid, sign_flip_share, t_cumulative, t_quantile, vendi
from tools.pictures import are_near, light_of, measure, phash_of, sharpness_of

CHANCE = np.random.default_rng


def photos() -> dict[str, Image.Image]:
    """Take the photographs that come with scikit-image and scikit-learn themselves."""
    data: Any = pytest.importorskip("skimage.data")
    sets: Any = pytest.importorskip("sklearn.datasets")
    names = ("astronaut", "camera", "chelsea", "coffee")
    found = {name: getattr(data, name)() for name in names}
    found |= dict(zip(("temple", "flower"), sets.load_sample_images().images, strict=True))
    return {name: Image.fromarray(pixels).convert("RGB") for name, pixels in found.items()}


# --- scipy ---


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 11, 24, 120])
def test_students_t_is_that_of_scipy(freedom: int) -> None:
    """Its quantiles, and the share below a value."""
    stats: Any = pytest.importorskip("scipy.stats")
    for share in (0.8, 0.95, 0.975):
        assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9)
    for value in (0.3, 1.7, 12.0):
        assert t_cumulative(value, freedom) == pytest.approx(stats.t.cdf(value, freedom), abs=1e-12)


def test_fid_is_that_of_a_matrixs_square_root() -> None:
    """As the published programs compute it, by scipy.linalg.sqrtm."""
    linalg: Any = pytest.importorskip("scipy.linalg")
    chance = CHANCE(1)
    one = chance.standard_normal((300, 16)) @ chance.standard_normal((16, 16))
    other = 0.5 + chance.standard_normal((200, 16)) @ chance.standard_normal((16, 16))
    first, second = np.cov(one.T), np.cov(other.T)
    root = linalg.sqrtm(first @ second).real
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum()
    assert fid(one, other) == pytest.approx(apart + np.trace(first + second - 2 * root), rel=1e-9)


def test_a_sign_flip_test_is_scipys_permutation_test() -> None:
    """Of paired samples, two-sided, by all patterns of signs."""
    stats: Any = pytest.importorskip("scipy.stats")
    values = CHANCE(2).standard_normal(9) + 0.4
    found = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_share(values.tolist()) == pytest.approx(found.pvalue)


# --- scikit-learn ---


def test_kids_kernel_is_the_polynomial_one_of_scikit_learn() -> None:
    """Of degree three, with the mean over all pairs but a row with itself."""
    pairwise: Any = pytest.importorskip("sklearn.metrics.pairwise")
    one, other = CHANCE(3).standard_normal((7, 5)), 1 + CHANCE(4).standard_normal((6, 5))
    inner, outer = (pairwise.polynomial_kernel(rows, degree=3) for rows in (one, other))
    means = [k[~np.eye(len(k), dtype=bool)].mean() for k in (inner, outer)]
    cross = pairwise.polynomial_kernel(one, other, degree=3).mean()
    assert kid(one, other) == pytest.approx(sum(means) - 2 * cross)


def test_the_vendi_score_is_the_exponential_of_scipys_entropy() -> None:
    """Of the eigenvalues of what is alike."""
    stats: Any = pytest.importorskip("scipy.stats")
    rows = CHANCE(5).standard_normal((9, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(rows @ rows.T / 9).clip(0)
    assert vendi(rows) == pytest.approx(np.exp(stats.entropy(values)))


# --- imagehash ---


def test_the_hash_is_that_of_imagehash() -> None:
    """Bit for bit. Of symmetric drawings rounding alone decides some, and they are left out."""
    imagehash: Any = pytest.importorskip("imagehash")
    for picture in (*map(scene, range(20)), *photos().values()):
        assert f"{phash_of(picture):016x}" == str(imagehash.phash(picture))


# --- photographs ---


def test_photographs_are_neither_near_nor_blurred_nor_dark() -> None:
    """Thresholds that hold for drawings hold for them."""
    measures = {name: measure(photo, 256) for name, photo in photos().items()}
    assert not any(are_near(*pair) for pair in itertools.combinations(measures.values(), 2))
    assert min(each.sharpness for each in measures.values()) > 100
    assert {each.light for each in measures.values()} == {None}
    assert [name for name, each in measures.items() if each.grey] == ["camera"]


def test_copies_of_photographs_are_found_and_blur_is_seen() -> None:
    """Stored with losses, made small, marked, made lighter; out of focus."""
    for photo in photos().values():
        own = measure(photo, 256)
        half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
        lighter = ImageEnhance.Brightness(photo).enhance(1.15)
        for copy in (jpeg(photo, 30), half, marked(photo), lighter):
            assert are_near(own, measure(copy, 256))
        soft = photo.filter(ImageFilter.GaussianBlur(photo.width / 80))
        assert sharpness_of(soft) < own.sharpness / 4
        assert light_of(own.thumbnail * 0.01) == "dark"
