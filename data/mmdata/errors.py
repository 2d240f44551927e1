"""`DataError`: the one error type that users of mmdata meet."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input or a bad option: one line with the file or option, its value, what is allowed and the fix."""

    is_user_error = True  # a program tells it without a traceback
