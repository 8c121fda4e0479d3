"""Bodies: the bytes of a request in, strict JSON out: no NaN and no half characters."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dlp_lora.serve.errors import APIError, invalid, of_exception

# curl's default. A web page may send it, or no type, to any address without permission, so both are refused if they are
# from another site's page.
FORM = "application/x-www-form-urlencoded"
MAX_DEPTH = 64
BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)  # or a string, of whatever length
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JSONRequest(Request):
    """A request whose body is JSON."""

    async def json(self) -> Any:
        """Reads the body.

        Raises:
            APIError: if it is no JSON, or holds NaN, half a character or too deep a nest.
        """
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


class JSONRoute(APIRoute):
    """A route with strict JSON bodies, whose errors all have an error object."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Gives the handler of a request."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if self.body_field is not None:
                check_type(request)
                # FastAPI decides only by the type that a body is JSON.
                headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
                scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
                request = JSONRequest(scope, request.receive)
            try:
                return await handle(request)
            except (HTTPException, RequestValidationError):
                raise
            except Exception as error:  # Starlette would close the connection
                raise of_exception(error, request.scope["state"]["request_id"]) from error

        return checked


def check_type(request: Request) -> None:
    """Checks that a body's content type is JSON, or missing.

    Raises:
        APIError: if it is another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    if kind in ("", FORM) and not _is_from_elsewhere(request):
        return
    raise APIError(415, f"the content type is {kind[:80]!r}, expected application/json", code="unsupported_media_type")


def parse(body: bytes) -> Any:
    """Parses a body.

    Raises:
        APIError: if it is no JSON, or holds NaN, half a character or too deep a nest.
    """
    try:
        # json.loads of bytes would also read UTF-16, and halves of characters.
        data = json.loads(str(body, "utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json") from error
    except json.JSONDecodeError as error:
        raise invalid(
            f"the body is no JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from error
    except (RecursionError, ValueError) as error:  # int() limits its digits
        raise invalid(f"the body cannot be read: {error}", code="invalid_json") from error
    if _depth(body) > MAX_DEPTH:
        raise invalid(f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
    if SURROGATE.search(body):
        _check_unicode(data)
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _depth(body: bytes) -> int:
    """The largest depth of brackets, up to the first one too deep."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for match in BRACKETS.finditer(body):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif token in (b"]", b"}"):
            depth -= 1
    return deepest


def _check_unicode(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise invalid("the body holds half a character (a lone surrogate)", code="invalid_json") from error


def _is_from_elsewhere(request: Request) -> bool:
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")
