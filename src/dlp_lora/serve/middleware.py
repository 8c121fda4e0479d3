"""The checks of every request: ids, limits, hosts, keys, headers, logs. Plain ASGI, so that disconnects are visible.

(BaseHTTPMiddleware hides them: https://github.com/vllm-project/vllm/issues/10087.)
"""

import ipaddress
import json
import re
import time
from collections.abc import Mapping, MutableMapping
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlp_lora.serve.errors import APIError
from dlp_lora.serve.logs import LOGGER
from dlp_lora.serve.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
GUARDED = ("/v1", "/tokenize", "/detokenize")
LOOPBACK_NAMES = ("localhost",)
QUIET = ("/health", "/metrics")  # requested every few seconds: not in the log
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """Passes on allowed requests, and logs their results."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        settings = service.settings
        self._max_body = int(settings.max_body_mb * 2**20)
        self._hosts = frozenset(host.lower() for host in settings.allow_host)
        self._is_local = _is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = sent if REQUEST_ID.fullmatch(sent) else uuid4().hex
        state["log"] = log = dict[str, Any]()
        start, status, num_read = time.perf_counter(), 0, 0

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    out.setdefault(name, value)
            await send(message)

        async def read() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_body:
                raise self._too_large()
            return message

        try:
            if (error := self._refusal(scope, headers)) is not None:
                log["reason"] = error.reason
                await _refuse(error, reply)
            else:
                await self._app(scope, read, reply)
        finally:
            self._note(scope, request_id, status, time.perf_counter() - start, log)

    def _refusal(self, scope: MutableMapping[str, Any], headers: Headers) -> APIError | None:
        if not self._is_known_host(headers.get("host")):
            return APIError(
                421,
                "the server does not answer to this name; start it with --allow-host, or with a key",
                code="unknown_host",
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
        if path.startswith(f"{prefix}/"):  # a server under a prefix has it in both
            path = path.removeprefix(prefix)
        scope["state"]["access"] = access = self._service.keys.access(headers.get("authorization"))
        is_guarded = any(path == prefix or path.startswith(f"{prefix}/") for prefix in GUARDED)
        if is_guarded and access is None:
            return APIError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _is_known_host(self, header: str | None) -> bool:
        """Whether a Host header names this server.

        Otherwise a web page whose name resolves to 127.0.0.1 could use a server on this machine that has no key. Some
        health checks send no header; browsers always do.
        """
        if header is None:
            return True
        name = _host_name(header)
        if self._hosts:
            return name in self._hosts or _is_loopback(name)
        return self._service.keys.has_users or not self._is_local or _is_loopback(name)

    def _too_large(self) -> APIError:
        megabytes = self._service.settings.max_body_mb
        return APIError(
            413,
            f"the body is larger than {megabytes:g} MB; send less, or start the server with a larger --max-body-mb",
            code="body_too_large",
        )

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float, log: Mapping[str, Any]) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        self._service.metrics.http_requests.labels(path, str(status or "closed")).inc()
        if "reason" in log:
            self._service.metrics.rejected.labels(log["reason"]).inc()
        if path in QUIET and status == 200:
            return
        LOGGER.info(
            "request",
            extra={
                "request_id": request_id,
                "method": scope["method"],
                "path": path if route is not None else "other",
                "status": status or "closed",
                "ms": round(seconds * 1e3, 1),
                **log,
            },
        )


async def _refuse(error: APIError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    raw = [(name.lower().encode(), value.encode()) for name, value in {**headers, **(error.headers or {})}.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK_NAMES or name.endswith(".localhost")
