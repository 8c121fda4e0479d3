"""LiteLLM: plain, streaming, and what its errors become."""

import sys
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "Tell me a tale"}]


def main(address: str) -> None:
    options = {"model": "hosted_vllm/tiny", "api_base": f"{address}/v1", "api_key": "k", "messages": MESSAGES}
    text = litellm.completion(**options, max_tokens=16).choices[0].message.content
    assert text
    pieces = litellm.completion(**options, max_tokens=16, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    fixed = litellm.completion(**options, max_tokens=16, extra_body={"dlp": {"fixed": {"math": 1.0}}})
    named = litellm.completion(**{**options, "model": "hosted_vllm/math"}, max_tokens=16)
    assert fixed.choices[0].message.content == named.choices[0].message.content
    too_long = [{"role": "user", "content": "x" * 2000}]
    check_raises(litellm.ContextWindowExceededError, **{**options, "messages": too_long})
    check_raises(litellm.NotFoundError, **{**options, "model": "hosted_vllm/nobody"})


def check_raises(error: type[Exception], **options: Any) -> None:
    try:
        litellm.completion(**options)
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


main(sys.argv[1])
