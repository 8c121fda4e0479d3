"""Which way layers are multiplied follows from the times that the ways took."""

import pytest

from dlp_lora.bank.paths import Way, choose


@pytest.mark.parametrize(
    "seconds, chosen",
    [
        ({"plain": [1.0, 1.1, 1.0, 1.2]}, "plain"),
        ({"plain": [1.0, 1.1, 1.0, 1.2], "stacked": [0.8, 0.9, 0.8, 0.9]}, "stacked"),
        ({"plain": [1.0, 1.1, 1.0, 1.2], "stacked": [1.1, 1.2, 1.1, 1.3]}, "plain"),
        # Faster in two turns of four only: within the spread.
        ({"plain": [1.0, 1.0, 1.0, 1.0], "stacked": [0.9, 0.9, 1.1, 1.1]}, "plain"),
        # A later way must be faster than those before it, not only than plain.
        ({"plain": [1.0] * 4, "stacked": [0.8] * 4, "prepacked": [0.9] * 4}, "stacked"),
        ({"plain": [1.0] * 4, "stacked": [0.8] * 4, "prepacked": [0.7] * 4}, "prepacked"),
    ],
)
def test_the_way_is_plain_unless_another_is_faster_by_more_than_the_spread(
    seconds: dict[Way, list[float]], chosen: Way
) -> None:
    assert choose(seconds) == chosen
