"""One rule for percentiles: the smallest measured value that so many per cent of all do not exceed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbatch.measure.percentile import median_lies_within, p99, percentile

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(values, st.integers(1, 100))
def test_it_is_the_smallest_value_that_enough_of_them_do_not_exceed(numbers, percent):
    result = percentile(numbers, percent)
    assert result in numbers
    assert 100 * sum(one <= result for one in numbers) >= percent * len(numbers)
    assert 100 * sum(one < result for one in numbers) < percent * len(numbers)


@given(values)
def test_p99_is_what_numpy_calls_the_inverted_distribution(numbers):
    assert p99(numbers) == np.percentile(numbers, 99, method="inverted_cdf")


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 2), (99, 99), (100, 99), (101, 100), (700, 693), (1000, 990)])
def test_the_rank_is_exact_also_where_99_hundredths_are_a_whole_number(count, rank):
    assert p99(range(count, 0, -1)) == rank


@pytest.mark.parametrize(("numbers", "percent"), [([], 99), ([1.0], 0), ([1.0], 101)])
def test_what_has_no_percentile_is_refused(numbers, percent):
    with pytest.raises(ValueError, match="percent"):
        percentile(numbers, percent)


@pytest.mark.parametrize(("count", "ranks"), [(6, (1, 6)), (8, (1, 8)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))])
def test_where_a_median_lies_is_what_the_tables_of_the_sign_test_say(count, ranks):
    assert median_lies_within(range(1, count + 1))[:2] == ranks
