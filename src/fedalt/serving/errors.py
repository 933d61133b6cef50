"""Errors as OpenAI's API tells them."""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_HEADERS: Final = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class ApiError(Exception):
    """A request that gets no answer: the HTTP status, a sentence, and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or _HEADERS.get(status)

    def response(self) -> JSONResponse:
        """What the client gets."""
        return JSONResponse({"error": self.body()}, self.status, headers=self.headers)

    def body(self) -> dict[str, Any]:
        """The error alone."""
        kind = (
            "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        )
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


async def told(_: Request, error: Exception) -> JSONResponse:
    """The response to any error."""
    if isinstance(error, RequestValidationError):
        error = _of_form(error)
    elif isinstance(error, HTTPException):
        words = {
            400: ("the request cannot be read; expected JSON in UTF-8", "invalid_json"),
            404: ("there is no such path here", "not_found"),
            405: ("this path takes another method", "bad"),
        }
        text, code = words.get(error.status_code, (str(error.detail), "bad"))
        error = ApiError(error.status_code, text, code, headers=error.headers)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "this is a fault in fedalt", "internal_error")
    return error.response()


def _of_form(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request; its values are not repeated."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        at, why = first["loc"][-1], first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the request is no JSON, at character {at}: {why}", "invalid_json")
    names = [str(part) for part in first["loc"][1:]]
    if not names:  # nothing, a list, or a form that curl sends where it is not told otherwise
        text = "expected a JSON object, with Content-Type: application/json"
        return ApiError(400, text, "invalid_value")
    place = ".".join(name for name in names if not name[:1].isupper())
    why = {"value_error": first.get("ctx", {}).get("error"), "missing": "it is missing"}
    text = f"{place}: {why.get(first['type'], first['msg'])}"
    return ApiError(400, text, "invalid_value", names[0])
