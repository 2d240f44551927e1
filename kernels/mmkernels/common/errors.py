"""The one error type that a caller of this package meets for a bad argument."""

from __future__ import annotations


class KernelArgumentError(ValueError):
    """An argument that a kernel cannot take: one line with its name, its value and what is allowed.

    Args:
        argument: name of the argument as the public function spells it.
        got: its value, or the property of it (shape, dtype) that is wrong.
        allowed: what would have been accepted.
    """

    is_user_error = True  # a program tells it without a traceback

    def __init__(self, argument: str, got: object, allowed: str) -> None:
        self.argument = argument
        super().__init__(" ".join(f"{argument}: got {got}; allowed: {allowed}".split()))

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call __init__ with the finished message; errors cross process borders by pickle.
        return _rebuild, (self.argument, str(self))


def _rebuild(argument: str, message: str) -> KernelArgumentError:
    error = KernelArgumentError.__new__(KernelArgumentError, message)
    error.argument = argument
    error.args = (message,)
    return error
