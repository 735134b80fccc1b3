"""Errors as OpenAI's clients know them.

    ClientGoneError              nobody is left to answer
    ApiError
    ├── InvalidRequestError      400   the request is at fault; `param` names where
    ├── AuthenticationError      401
    ├── ForbiddenError           403   a web page, or another machine, without a key
    ├── NotFoundError            404
    ├── NotFinishedError         409   the job has not ended, or has no whole answer; not retried by the SDKs
    ├── GoneError                410   the job is known, what it said is not stored any more
    ├── PayloadTooLargeError     413
    ├── OtherBodyError           422   an `Idempotency-Key` came with another body before
    ├── QueueFullError           429   retried by the SDKs
    ├── JobFailedError           5xx   the job ended without a whole answer; not retried by the SDKs
    ├── QueueUnreachableError    503   retried by the SDKs
    └── FilesUnavailableError    503   retried by the SDKs

The body is always `{"error": {"message", "type", "param", "code"}}`; nothing else has a top-level `error`.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from shared.entries import ErrorMarker
from shared.jobs import ErrorCode
from shared.text import json_bytes

RETRY_AFTER_S = 2  # the SDKs honour 1 to 60


class ClientGoneError(Exception):
    """The client closed its connection, or stopped reading, before it had its answer."""


class ApiError(Exception):
    """Ends a request with an error response. The message is shown to the client."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status

    def body(self) -> bytes:
        return error_body(self.message, type_=self.type, code=self.code, param=self.param)

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


class InvalidRequestError(ApiError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class AuthenticationError(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class NotFoundError(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class NotFinishedError(ApiError):
    status = 409
    type = "invalid_request_error"
    code = "not_finished"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})  # the SDKs would, at once, three times


class GoneError(ApiError):
    status = 410
    type = "invalid_request_error"
    code = "gone"


class PayloadTooLargeError(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class OtherBodyError(ApiError):
    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another request body. Use a new key for a new request.")


class QueueFullError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"retry-after": str(RETRY_AFTER_S)})


class QueueUnreachableError(ApiError):
    status = 503
    code = "queue_unreachable"

    def __init__(self, *, may_have_started: bool) -> None:
        headers = {"retry-after": str(RETRY_AFTER_S)}
        if may_have_started:  # the SDKs are not to run the agent twice by themselves
            headers["x-should-retry"] = "false"
        super().__init__("The queue cannot be reached. Try again.", headers=headers)


class ForbiddenError(ApiError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class FilesUnavailableError(ApiError):
    status = 503
    code = "files_unavailable"

    def __init__(self, message: str = "The stored files cannot be reached. Try again.") -> None:
        super().__init__(message, headers={"retry-after": str(RETRY_AFTER_S)})


_STATUS_OF_CODE = {
    ErrorCode.TIMEOUT: 504,
    ErrorCode.QUEUE_TIMEOUT: 504,
    ErrorCode.NO_WORKER: 503,
    ErrorCode.WORKER_STOPPED: 503,
    ErrorCode.STREAM_UNREACHABLE: 503,
    ErrorCode.STREAM_INTERRUPTED: 503,
    ErrorCode.CANCELLED: 409,
}


class JobFailedError(ApiError):
    """A job's error marker as an HTTP response.

    The agent may have acted already, so the SDKs are told not to send the request again by themselves.
    """

    def __init__(self, marker: ErrorMarker) -> None:
        self.marker = marker
        super().__init__(
            marker.message,
            code=marker.code,
            status=_STATUS_OF_CODE.get(marker.code, 500),  # type: ignore[call-overload]  # a code may be from a newer worker
            headers={"x-should-retry": "false"},
        )


def error_body(message: str, *, type_: str, code: str | None, param: str | None = None) -> bytes:
    """The JSON of an error response, and of the error frame that ends a stream."""
    return json_bytes({"error": {"message": message, "type": type_, "param": param, "code": code}})
