"""Answer to a request that is not served, as OpenAI's clients read it."""

from __future__ import annotations

import reprlib
from typing import Any

from mmtrain.errors import UserError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(UserError):
    """Request that gets an error instead of an answer.

    Args:
        status: HTTP's.
        message: one line: what is wrong, what is allowed, and the way out.
        param: name of the field of the body that is wrong; None where it is none.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the object that is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, value: Any, problem: str) -> Refusal:
    """Return the refusal of a field's value."""
    return Refusal(400, f"{param}={reprlib.repr(value)}: {problem}", param, "invalid_value")
