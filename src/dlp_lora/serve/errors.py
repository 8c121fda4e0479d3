"""Errors of requests in OpenAI's format: a status, and an `error` object."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from dlp_lora.errors import DLPLoRAError
from dlp_lora.serve.backend import BackendError, ClosedError, QueueFullError, UnavailableError
from dlp_lora.serve.logs import LOGGER

RETRY_AFTER_S = 1


class ErrorObject(TypedDict):
    """The error; `param` is the wrong field of the request, if there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The body of every answer with a status of 400 or more."""

    error: ErrorObject


class APIError(HTTPException):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body: ErrorResponse = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def __str__(self) -> str:
        return self.body["error"]["message"]

    @property
    def reason(self) -> str:
        """One word for metrics and logs."""
        return self.body["error"]["code"] or self.body["error"]["type"]


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """A request with a wrong field `param`."""
    return APIError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> APIError:
    """A request for a feature that this server does not have."""
    return invalid(message, param, "unsupported_parameter")


def too_long(num_tokens: str, num_new: int, limit: int, param: str) -> APIError:
    """A prompt that leaves no room for its answer. Clients look for "maximum context length is"."""
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, you requested {num_new} tokens of an answer "
        f"to a prompt of {num_tokens}. Shorten the prompt or ask for a shorter answer.",
        param,
        "context_length_exceeded",
    )


def unavailable(message: str, code: str) -> APIError:
    """A request that may be sent again in a moment."""
    return APIError(503, message, type="service_unavailable", code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def of_exception(error: BaseException, request_id: str) -> APIError:
    """Turns an exception into an APIError; details that are only for the server's log go there."""
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:  # of a task group
        return of_exception(error.exceptions[0], request_id)
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        return unavailable(str(error), "queue_full")
    if isinstance(error, ClosedError):
        return unavailable(str(error), "shutting_down")
    if isinstance(error, UnavailableError):
        return unavailable(str(error), "backend_unavailable")
    if isinstance(error, BackendError):
        LOGGER.error("the backend failed", exc_info=error, extra={"request_id": request_id})
        return APIError(500, str(error), type="server_error", code="backend_error")
    if isinstance(error, DLPLoRAError | ValueError):
        return invalid(str(error))
    LOGGER.error("a request failed", exc_info=error, extra={"request_id": request_id})
    message = f"internal error; the server's log has it under the request id {request_id}"
    return APIError(500, message, type="server_error", code="internal_error")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """A request that does not have the API's form; `errors` are pydantic's."""
    # If a field may have several types, there is an error for each: the deepest one is the most exact.
    error = max(errors, key=lambda error: (error["type"] == "unsupported", len(error["loc"])))
    context = error.get("ctx", {})
    places = [str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
    places = [place for place in places if place not in KINDS] + ([context["field"]] if "field" in context else [])
    where = ".".join(places) or None
    if error["type"] == "missing" and tuple(error["loc"]) == ("body",):
        return invalid("the request has no body; send a JSON object", code="invalid_body")
    message = f"{where}: {error['msg']}" if where else str(error["msg"])
    return unsupported(where or "", message) if error["type"] == "unsupported" else invalid(message, where)


KINDS = ("body", "str", "int", "float", "list", "dict")  # stand among pydantic's places, and are no fields
