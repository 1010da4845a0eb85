"""tools/intervals.py: intervals hold the truth as often as they say; distances, formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.intervals import (
    chance_of,
    cmmd,
    compare,
    cubic,
    estimate,
    fid,
    gaussian,
    higher_share,
    kid,
    leading_share,
    set_distance,
    sign_flip_share,
    simplest_of_the_best,
    t_cumulative,
    t_quantile,
    unit,
    vendi,
)

CHANCE = np.random.default_rng


@pytest.mark.parametrize(
    ("freedom", "value"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (7, 2.3646),
        (11, 2.2010),
        (24, 2.0639),
        (120, 1.9799),
    ],
)
def test_the_quantiles_are_those_of_the_printed_table(freedom: int, value: float) -> None:
    """Two-sided, 95 %."""
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 5, 8])
def test_the_sum_is_the_integral_of_the_density(freedom: int) -> None:
    """Student's, by the rule of trapezoids."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    places = np.linspace(0, 1.7, 20_001)
    density = scale * (1 + places**2 / freedom) ** (-(freedom + 1) / 2)
    assert t_cumulative(1.7, freedom) == pytest.approx(
        0.5 + np.trapezoid(density, places), abs=1e-8
    )


def scores(
    chance: np.random.Generator, prompts: int, seeds: int, mean: float = 0.6
) -> dict[str, list[float]]:
    """Draw scores that resemble each other inside a prompt."""
    centres = mean + 0.02 * chance.standard_normal(prompts)
    return {
        f"p{n}": list(centre + 0.03 * chance.standard_normal(seeds))
        for n, centre in enumerate(centres)
    }


@pytest.mark.parametrize(("prompts", "seeds"), [(4, 16), (12, 4), (25, 4)])
def test_the_interval_holds_the_truth_in_95_of_100_sets(prompts: int, seeds: int) -> None:
    """Of 1,000 simulated ones, where counting pictures would hold it in 58 to 85 of 100."""
    chance, held, naive = CHANCE(1), 0, 0
    for _ in range(1000):
        cells = scores(chance, prompts, seeds)
        found, flat = estimate(cells), np.concatenate(list(cells.values()))
        held += abs(found.mean - 0.6) <= (found.half_width or 0)
        naive += abs(flat.mean() - 0.6) <= 1.98 * flat.std(ddof=1) / math.sqrt(flat.size)
    assert 0.93 <= held / 1000 <= 0.97
    assert naive / 1000 < 0.9


def test_a_difference_that_can_be_resolved_is_seen_in_8_of_10_sets() -> None:
    """And one of a third of it seldom."""
    chance, seen = CHANCE(2), {1.0: 0, 0.3: 0}
    for _ in range(400):
        for share in seen:
            one, other = scores(chance, 12, 4), scores(chance, 12, 4)
            size = math.hypot(0.02 * math.sqrt(2), 0.03 * math.sqrt(2 / 4)) / math.sqrt(12)
            shift = share * (t_quantile(0.975, 11) + t_quantile(0.8, 11)) * size
            moved = {prompt: [value + shift for value in values] for prompt, values in one.items()}
            seen[share] += compare(moved, other).surely_not_zero
    assert 0.74 < seen[1.0] / 400 < 0.88
    assert seen[0.3] / 400 < 0.3


@pytest.mark.parametrize(("prompts", "seeds"), [(3, 4), (8, 1)])
def test_too_little_has_a_mean_and_no_interval(prompts: int, seeds: int) -> None:
    """Nothing can be concluded."""
    found = estimate(scores(CHANCE(3), prompts, seeds))
    assert (found.half_width, found.resolvable, found.prompts) == (None, None, prompts)


def test_pairs_tell_more_than_sets() -> None:
    """What prompt and seed have in common falls out."""
    cells = scores(CHANCE(4), 12, 4)
    better = {prompt: [value + 0.005 for value in values] for prompt, values in cells.items()}
    found = compare(better, cells)
    assert found.mean == pytest.approx(0.005)
    assert found.surely_not_zero
    assert (estimate(cells).half_width or 0) > 0.005


def test_flipping_signs_is_exact_for_few_and_fair_without_effect() -> None:
    """The smallest share of eight is two in 256; without an effect, shares are spread evenly."""
    assert sign_flip_share([0.1] * 8) == 2 / 256
    assert sign_flip_share([0.1, -0.1]) == 1
    chance = CHANCE(5)
    shares = np.array([sign_flip_share(chance.standard_normal(8).tolist()) for _ in range(400)])
    assert 0.02 <= (shares <= 0.05).mean() <= 0.08
    assert 0.4 <= (shares <= 0.5).mean() <= 0.6
    assert sign_flip_share([0.1 + n / 1000 for n in range(20)]) <= 0.01


def test_of_equal_arms_the_simplest_is_chosen() -> None:
    """Which happens to be best does not matter; one that is worse is not chosen."""
    chance, firsts = CHANCE(6), 0
    for _ in range(50):
        common = scores(chance, 12, 4)
        arms = [
            {p: [v + 0.01 * chance.standard_normal() for v in vs] for p, vs in common.items()}
            for _ in range(5)
        ]
        chosen, alike = simplest_of_the_best(arms)
        firsts += chosen == 0
        assert chosen in alike
    assert firsts > 25
    worse = {prompt: [value - 0.1 for value in values] for prompt, values in common.items()}
    chosen, alike = simplest_of_the_best([worse, *arms])
    assert chosen > 0
    assert 0 not in alike


def test_what_may_lead_by_chance_is_what_drawn_orders_have() -> None:
    """Of ten of one kind among five of another: how many of the highest are of the first."""
    chance, leads = CHANCE(11), []
    for _ in range(4000):
        order = chance.permutation([1] * 10 + [0] * 5)
        leads.append(int(np.argmin(order)))
    limit = leading_share(5, 10)
    assert np.mean(np.array(leads) / 10 > limit) <= 0.06
    assert np.mean(np.array(leads) / 10 >= limit) > 0.05


def test_one_set_above_another_is_told_from_chance() -> None:
    """A share of pairs, by counting them; ties count half."""
    share, by_chance = higher_share([3, 4, 5], [1, 2, 3])
    assert share == pytest.approx(8.5 / 9)
    assert by_chance == pytest.approx(2 / 20, abs=0.03)  # of 20 orders, two are as far
    chance = CHANCE(12)
    sets = [chance.standard_normal((2, 8)).tolist() for _ in range(100)]
    shares = [higher_share(one, other) for one, other in sets]
    assert np.mean([share for share, _ in shares]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([p <= 0.1 for _, p in shares]) < 0.2


# --- distances ---


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_interval_of_a_distance_holds_the_truth_for_twelve_training_pictures(
    shift: float,
) -> None:
    """Of 400 simulated sets, pictures of one prompt being alike, in at least 93 of 100."""
    chance, held, size = CHANCE(13), 0, 24
    centre, moved = np.eye(size)[0], np.eye(size)[0] + shift * np.eye(size)[1]

    def pictures(mean: np.ndarray, prompts: int, seeds: int) -> np.ndarray:
        own = mean + 0.7 * chance.standard_normal((prompts, 1, size)) / size**0.5
        each = own + 0.7 * chance.standard_normal((prompts, seeds, size)) / size**0.5
        return unit(each.reshape(-1, size))

    truth, found = cmmd(pictures(centre, 3000, 1), pictures(moved, 3000, 1)), []
    for _ in range(400):
        groups = [number for number in range(12) for _ in range(4)]
        drawn = pictures(moved, 12, 4)
        told = set_distance(gaussian, pictures(centre, 12, 1), drawn, groups)
        held += abs(told.mean - truth) <= (told.half_width or 0)
        found.append(told.mean)
    assert held / 400 >= 0.93
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / 20  # no bias, in spite of prompts


def test_a_distance_of_few_has_no_interval() -> None:
    """Three prompts or three pictures are too few."""
    rows = unit(CHANCE(14).standard_normal((12, 4)))
    assert set_distance(gaussian, rows[:3], rows[3:], range(9)).half_width is None
    assert set_distance(cubic, rows[:6], rows[6:], list("aabbcc")).half_width is None
    assert set_distance(cubic, rows[:6], rows[6:], list("abcdef")).half_width


def test_by_chance_alone_fid_is_what_halves_of_one_set_have() -> None:
    """A set drawn anew stays below it, one that is elsewhere does not."""
    chance = CHANCE(15)
    one = chance.standard_normal((30, 8))
    limit = chance_of(one, 30, fid)
    assert fid(one, chance.standard_normal((30, 8))) < 2 * limit
    assert fid(one, 3 + chance.standard_normal((30, 8))) > 5 * limit


def test_cmmd_is_the_sum_over_all_pairs_without_their_own() -> None:
    """Held against the formula, pair by pair."""
    chance = CHANCE(7)
    one, other = unit(chance.standard_normal((5, 8))), unit(chance.standard_normal((4, 8)))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / 200)

    first = np.mean([kernel(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if i != j])
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    second = np.mean([kernel(other[i], other[j]) for i, j in pairs])
    third = np.mean([kernel(a, b) for a in one for b in other])
    assert cmmd(one, other) == pytest.approx(1000 * (first + second - 2 * third))


def test_distances_without_bias_are_zero_on_average_for_small_sets() -> None:
    """Of twelve pictures each, where FID sees a gulf."""
    chance = CHANCE(8)
    sets = [
        (chance.standard_normal((12, 64)), chance.standard_normal((12, 64))) for _ in range(200)
    ]
    for distance in (kid, lambda a, b: cmmd(unit(a), unit(b))):
        found = np.array([distance(*pair) for pair in sets])
        assert abs(found.mean()) < 4 * found.std() / math.sqrt(len(found))
    assert min(fid(*pair) for pair in sets) > 10


def test_fid_is_that_of_the_two_gaussians() -> None:
    """By the square root of the product of covariances, where there are rows enough."""
    chance = CHANCE(9)
    one = chance.standard_normal((200, 6)) @ chance.standard_normal((6, 6))
    other = 1 + chance.standard_normal((300, 6)) @ chance.standard_normal((6, 6))
    first, second = np.cov(one.T), np.cov(other.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0)).sum()
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum()
    expected = apart + np.trace(first) + np.trace(second) - 2 * roots
    assert fid(one, other) == pytest.approx(expected, rel=1e-9)
    assert fid(one, one) == pytest.approx(0, abs=1e-8)


def test_kid_sees_a_shift() -> None:
    """A cubic kernel, by its sum."""
    chance = CHANCE(10)
    one, other = chance.standard_normal((6, 4)), chance.standard_normal((5, 4)) + 1

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    def within(rows: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return float(np.mean([kernel(rows[i], rows[j]) for i, j in pairs]))

    cross = np.mean([kernel(a, b) for a in one for b in other])
    assert kid(one, other) == pytest.approx(within(one) + within(other) - 2 * cross)


def test_vendi_counts_what_is_different() -> None:
    """All alike are one; all at right angles are as many as there are."""
    assert vendi(unit([[1.0, 0.0]] * 5)) == pytest.approx(1)
    assert vendi(np.eye(5)) == pytest.approx(5)
    assert vendi(unit([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])) == pytest.approx(2)
