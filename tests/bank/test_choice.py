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
        # One slow turn of a busy machine does not hide a faster way, nor does one fast turn make one.
        ({"plain": [1.0] * 5, "columns": [0.8, 0.8, 0.8, 3.0, 3.0]}, "columns"),
        ({"plain": [1.0] * 5, "columns": [0.2, 0.2, 1.0, 1.0, 1.0]}, "plain"),
        # A hundredth is no reason, and memory needs a better one.
        ({"plain": [1.0] * 4, "stacked": [0.99] * 4}, "plain"),
        ({"plain": [1.0] * 4, "stacked": [0.8] * 4, "prepacked": [0.75] * 4}, "stacked"),
    ],
)
def test_the_way_is_plain_unless_another_is_clearly_faster_in_the_median_turn(
    seconds: dict[Way, list[float]], chosen: Way
) -> None:
    assert choose(seconds) == chosen
