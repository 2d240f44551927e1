"""What the commands of `launch/` share beside Hydra's: how they refuse, end, and show how far they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from mmtrain.errors import is_user_error
from mmtrain.output import silence

BAD_INPUT, INTERRUPTED, CLOSED = 2, 130, 141  # the latter two as a shell reports SIGINT and SIGPIPE


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with code 2."""
        self.exit(BAD_INPUT, f"error: {message}; see --help\n")


def exit_code(command: Callable[[], int | None], interrupted: Callable[[], None] = lambda: None) -> int:
    """Run a command and return its exit code; a user's mistake is a line on stderr, a bug keeps its traceback.

    Args:
        command: returns its exit code, None for 0.
        interrupted: is called after Ctrl-C, to say what became of the work.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        interrupted()
        return INTERRUPTED
    except BrokenPipeError:
        silence(sys.stdout)  # Python flushes once more when it ends
        return CLOSED
    except Exception as error:
        if not is_user_error(error) and not (isinstance(error, OSError) and error.filename):
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


@contextmanager
def byte_bar(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, in a terminal, while the block runs and tells the bytes that it has dealt with."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    hidden = quiet or total == 0 or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
