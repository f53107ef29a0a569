"""Requests that the server refuses: an HTTP status, a code for programs and a sentence for people."""


class RequestError(Exception):
    """
    The request cannot be served. Nothing of the server's inside (paths, traces) is in the message.

    Args:
        message: what is wrong and what is allowed.
        code: a short name for programs, such as `"invalid_photo"`.
        status: the HTTP status.
        headers: further headers of the answer.
    """

    status, code = 400, "invalid_request"

    def __init__(
        self, message: str, code: str | None = None, status: int | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.code, self.status, self.headers = code or self.code, status or self.status, headers or {}


class InvalidPhotoError(RequestError):
    """The photo cannot be read, or is not allowed."""

    code = "invalid_photo"


class TooLargeError(RequestError):
    """The body, file, photo or archive exceeds a limit."""

    status, code = 413, "too_large"


class AuthenticationError(RequestError):
    """The request has no API key, or an unknown one."""

    status, code = 401, "auth_failed"


class TooBusyError(RequestError):
    """The queue is full, or the server is about to stop. The client may come again after `retry_after` seconds."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: int, status: int | None = None):
        super().__init__(message, status=status, headers={"Retry-After": str(retry_after)})


class TooSlowError(RequestError):
    """The body, a fetched photo or the work took longer than allowed."""

    status, code = 408, "timeout"


class WorkerError(RequestError):
    """The network failed on this photo; the server goes on."""

    status, code = 500, "processing_failed"
