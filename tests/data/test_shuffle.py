from __future__ import annotations

from collections import Counter

import pytest

from moesaic.data.shuffle import Permutation, key, mix, uniform


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_is_a_permutation(n: int) -> None:
    order = Permutation(n, key(0, "x", n))
    assert sorted(order[i] for i in range(n)) == list(range(n))


def test_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        Permutation(5, 0)[5]


def test_every_place_is_as_likely() -> None:
    n, trials = 5, 4000
    counts = Counter((i, Permutation(n, key(t))[i]) for t in range(trials) for i in range(n))
    expected = trials / n
    chi2 = sum((counts[i, j] - expected) ** 2 / expected for i in range(n) for j in range(n))
    assert chi2 < 50  # 16 degrees of freedom: above 50 with probability 2e-5


def test_neighbours_do_not_stay_neighbours() -> None:
    n = 10_000
    order = Permutation(n, key("neighbours"))
    close = sum(abs(order[i] - order[i + 1]) < n // 100 for i in range(n - 1))
    assert 130 < close < 270  # 2 % of the pairs


def test_numbers_are_uniform_and_the_same_everywhere() -> None:
    values = [uniform(key(3), i) for i in range(10_000)]
    assert abs(sum(values) / 10_000 - 0.5) < 0.012
    assert 0 <= min(values) < 0.001
    assert 0.999 < max(values) < 1
    # splitmix64 with seed 1234567: the reference values of its author's test
    state = 1234567
    assert [mix(state, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
