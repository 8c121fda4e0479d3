"""Errors of requests in OpenAI's format: a status, and an `error` object."""

import json
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
    answer, remedy = "", "so that an answer fits"
    if num_new > 1:
        answer, remedy = f", and you requested an answer of {num_new}", "or request a shorter answer"
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, the prompt has {num_tokens}{answer}. "
        f"Shorten the prompt {remedy}.",
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
    # A field with several types has an error for each. One with the right type and a wrong value comes first, then the
    # deepest, which is the most exact.
    error = max(errors, key=lambda e: (e["type"] == "unsupported", e["type"] not in TYPES, len(_places(e))))
    if error["type"] == "missing" and tuple(error["loc"]) == ("body",):
        return invalid("the request has no body; send a JSON object", code="invalid_body")
    where = ".".join(_places(error)) or None
    types = [TYPES[e["type"]] for e in errors if e["type"] in TYPES and _places(e) == _places(error)]
    context = error.get("ctx", {})
    if error["type"] in TYPES:
        expected = " or ".join(dict.fromkeys(types)).format_map(context)
        message = f"must be {expected}, got {_shown(error['input'])}"
    elif error["type"] in RULES:
        limits = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in context.items()}
        message = RULES[error["type"]].format_map({**limits, "found": _shown(error["input"])})
    else:
        message = error["msg"]
    message = f"{where}: {message}" if where else message.replace("must be", "the body must be", 1)
    return unsupported(where or "", message) if error["type"] == "unsupported" else invalid(message, where)


# By the types of pydantic's errors: the types of fields, and the rules for values of the right type.
TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
}
RULES = {
    "missing": "this field is required",
    "greater_than_equal": "must be at least {ge}, got {found}",
    "greater_than": "must be more than {gt}, got {found}",
    "less_than_equal": "must be at most {le}, got {found}",
    "less_than": "must be less than {lt}, got {found}",
    "too_short": "the list must have {min_length} or more items, got {actual_length}",
    "too_long": "the list must have at most {max_length} items, got {actual_length}",
    "string_too_short": "must have {min_length} or more characters, got {found}",
    "string_too_long": "must have at most {max_length} characters, got {found}",
    "string_pattern_mismatch": "must match {pattern}, got {found}",
}
KINDS = ("body", "str", "int", "float", "list", "dict", "NamedTool")  # in pydantic's places, but not fields
MAX_SHOWN = 60  # characters


def _places(error: Mapping[str, Any]) -> list[str]:
    """The path of the field that an error is about."""
    places = [str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
    context = error.get("ctx", {})
    return [place for place in places if place not in KINDS] + ([context["field"]] if "field" in context else [])


def _shown(value: Any) -> str:
    """A value of a request in a message, shortened."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
