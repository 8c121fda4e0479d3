"""What a request may ask of a backend."""

from typing import Any

import pytest

from dlp_lora.serve.backend import Sampling


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], got 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, got -1"),
        ({"num_logprobs": -1}, "num_logprobs must be at least 0, got -1"),
        ({"stop": ("a", "")}, "a stop string must not be empty"),
    ],
)
def test_what_cannot_be_sampled_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)
