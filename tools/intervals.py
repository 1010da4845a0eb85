"""What a few pictures can tell, and what they cannot: means with honest intervals, and distances.

The unit is the prompt. Pictures of one prompt resemble each other, so that counting each of them
would promise too much: seeds are averaged inside a prompt, and prompts are what varies.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[Any]]

SURE, LIKELY = 0.975, 0.8  # of a two-sided interval of 95 %, and of seeing what is there
SURE_ONE_SIDED = 0.95
MOST_FLIPS = 14  # prompts; beyond, a share of all sign patterns is drawn
FEW_PROMPTS, FEW_SEEDS = 4, 2  # below, an interval would be a guess


@functools.cache
def t_quantile(share: float, freedom: int) -> float:
    """Tell below which value a Student's t of so many degrees lies with this probability."""
    low, high = 0.0, 1e6
    for _ in range(200):
        half = (low + high) / 2
        if t_cumulative(half, freedom) < share:
            low = half
        else:
            high = half
    return low


def t_cumulative(value: float, freedom: int) -> float:
    """Tell how probably a Student's t is below a value: a finite sum for whole degrees."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for step in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * step / (step + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inside) / 2


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and how far the truth may be from it."""

    mean: float
    half_width: float | None  # of the interval that holds the truth in 95 of 100 cases
    prompts: int
    resolvable: float | None = None  # the smallest difference that would likely be seen

    @property
    def surely_not_zero(self) -> bool:
        """Tell whether zero lies outside."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(cells: Mapping[str, Sequence[float]]) -> Estimate:
    """Average scores by prompt and seed, with Student's interval over the prompts."""
    means = [sum(seeds) / len(seeds) for seeds in cells.values() if seeds]
    mean = sum(means) / len(means)
    if len(means) < FEW_PROMPTS or min(map(len, cells.values())) < FEW_SEEDS:
        return Estimate(mean, None, len(means))
    spread = math.sqrt(sum((each - mean) ** 2 for each in means) / (len(means) - 1))
    error, freedom = spread / math.sqrt(len(means)), len(means) - 1
    sure = t_quantile(SURE, freedom)
    return Estimate(mean, sure * error, len(means), (sure + t_quantile(LIKELY, freedom)) * error)


def compare(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> Estimate:
    """Estimate by how much one is above the other, cell by cell: same prompt, same seed."""
    pairs = {prompt: zip(one[prompt], other[prompt], strict=True) for prompt in one}
    return estimate({prompt: [a - b for a, b in both] for prompt, both in pairs.items()})


def sign_flip_share(differences: Sequence[float]) -> float:
    """Tell how often chance alone, flipping signs, would move a mean as far: a p-value.

    Exact for few prompts; else a thousand patterns that are always the same.
    """
    values = np.asarray(differences, float)
    if len(values) <= MOST_FLIPS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (1000, len(values)))
        signs[0] = 1
    means = np.abs((signs * values).mean(axis=1))
    return float((means >= abs(values.mean()) - 1e-12).mean())


def simplest_of_the_best(arms: Sequence[Mapping[str, Sequence[float]]]) -> tuple[int, list[int]]:
    """Choose among arms that stand in order, the simplest first: the one-standard-error rule.

    Returns the first arm that is within one standard error of the best, and all of those that
    cannot be told from the best.
    """
    best = max(range(len(arms)), key=lambda number: estimate(arms[number]).mean)
    chosen, alike = best, []
    for number, arm in enumerate(arms):
        gap = compare(arms[best], arm)
        if number != best and gap.half_width is None:
            continue
        if number == best or not gap.surely_not_zero:
            alike.append(number)
        freedom = max(1, gap.prompts - 1)
        error = (gap.half_width or 0) / t_quantile(SURE, freedom)
        if gap.mean <= error:
            chosen = min(chosen, number)
    return chosen, alike


# --- Distances of sets, of rows that are vectors ---


Kernel = Callable[[Numbers, Numbers], Numbers]  # how alike each row of one is to each of the other


def gaussian(one: Numbers, other: Numbers) -> Numbers:
    """Compare by CMMD's kernel: a Gaussian of width 10, times 1000."""
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    return np.asarray(1000 * np.exp(-np.maximum(squares, 0) / 200))


def cubic(one: Numbers, other: Numbers) -> Numbers:
    """Compare by the kernel of the Kernel Inception Distance."""
    return np.asarray((one @ other.T / one.shape[1] + 1) ** 3)


def cmmd(one: Numbers, other: Numbers) -> float:
    """Compare two sets of unit vectors without bias: it means something for ten pictures already.

    Without bias, it may fall below zero.
    """
    return unbiased(gaussian(one, one), gaussian(other, other), gaussian(one, other))


def kid(one: Numbers, other: Numbers) -> float:
    """Compare two sets by the Kernel Inception Distance, without bias."""
    return unbiased(cubic(one, one), cubic(other, other), cubic(one, other))


def unbiased(inner: Numbers, outer: Numbers, cross: Numbers, apart: Numbers | None = None) -> float:
    """Compare two sets by how alike their rows are, leaving out rows with themselves.

    `apart` tells which rows of the second set may be compared with each other.
    """
    count = len(inner)
    first = (inner.sum() - np.trace(inner)) / (count * (count - 1))
    second = outer[~np.eye(len(outer), dtype=bool) if apart is None else apart].mean()
    return float(first + second - 2 * cross.mean())


def set_distance(
    kernel: Kernel, one: Numbers, other: Numbers, groups: Sequence[object]
) -> Estimate:
    """Tell how far two sets are apart, with an interval by leaving out one after the other.

    Rows of the other set that have a group in common, as pictures of one prompt do, resemble each
    other: they are left out together, and not compared with each other.
    """
    labels = np.asarray([*map(list(groups).index, groups)])
    inner, outer, cross = kernel(one, one), kernel(other, other), kernel(one, other)
    apart, kinds = labels[:, None] != labels[None], np.unique(labels)
    whole = unbiased(inner, outer, cross, apart)
    if len(one) < FEW_PROMPTS or len(kinds) < FEW_PROMPTS:
        return Estimate(whole, None, len(kinds))
    ones = [np.arange(len(one)) != number for number in range(len(one))]
    others = [labels != kind for kind in kinds]
    without = [unbiased(inner[np.ix_(k, k)], outer, cross[k], apart) for k in ones]
    less = [unbiased(inner, outer[np.ix_(k, k)], cross[:, k], apart[np.ix_(k, k)]) for k in others]
    error = math.sqrt(sum((len(each) - 1) * np.var(each) for each in (without, less)))
    return Estimate(whole, t_quantile(SURE, min(len(one), len(kinds)) - 1) * error, len(kinds))


def fid(one: Numbers, other: Numbers) -> float:
    """Compare the Gaussians of two sets, exactly, also where there are fewer rows than columns.

    For few pictures this is large whatever they show: it goes with a null of its own.
    """
    left, right = one - one.mean(0), other - other.mean(0)
    m, n = len(one) - 1, len(other) - 1
    joint = np.linalg.norm(left @ right.T, "nuc") / math.sqrt(m * n)
    spread = (left**2).sum() / m + (right**2).sum() / n
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + spread - 2 * joint)


def chance_of(one: Numbers, count: int, distance: Callable[[Numbers, Numbers], float]) -> float:
    """Tell what a distance is in 95 of 100 cases at most, where both sets come from one."""
    chance, found = np.random.default_rng(0), []
    for _ in range(200):
        rows = (chance.integers(len(one), size=size) for size in (len(one), count))
        found.append(distance(*(one[each] for each in rows)))
    return float(np.quantile(found, 0.95))


def leading_share(others: float, count: int) -> float:
    """Tell which share of so many may be above all of the others by chance, in 95 of 100 cases.

    All being alike, the highest j are all of one kind with a probability that is a product.
    """
    likely = 1.0
    for number in range(count):
        likely *= (count - number) / (others + count - number)
        if likely <= 1 - SURE_ONE_SIDED:
            return number / count
    return 1.0


def higher_share(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Tell how often one of the first is above one of the others, and how often by chance alone.

    Half is what to expect; the second number is a p-value, by a thousand drawn orders.
    """

    def share(values: Numbers) -> float:
        gaps = values[: len(ones), None] - values[None, len(ones) :]
        return float(((gaps > 0) + (gaps == 0) / 2).mean())

    both, chance = np.asarray([*ones, *others], float), np.random.default_rng(0)
    found = share(both)
    reached = sum(share(chance.permutation(both)) >= found - 1e-12 for _ in range(999))
    return found, (reached + 1) / 1000


def vendi(vectors: Numbers) -> float:
    """Count how many different pictures a set has in effect: 1 for all alike, n for none alike."""
    values = np.linalg.eigvalsh(vectors @ vectors.T / len(vectors))
    positive = values[values > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def unit(vectors: Iterable[Any]) -> Numbers:
    """Bring vectors to length one, as rows."""
    rows = np.asarray(list(vectors), float)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
