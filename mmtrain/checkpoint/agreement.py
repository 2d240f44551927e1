"""Work that one rank does for all: each gets its result, or raises its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmtrain.errors import ConfigError, UserError, brief

T = TypeVar("T")


class MainFailed(Exception):
    """An error of the main process that this rank ends on too; its message is the main process's."""


def on_main(call: Callable[[], T]) -> T:
    """Call on rank 0 while the others wait, and return its result on every rank. Collective; a process alone calls.

    Args:
        call: its result must pickle.

    Raises:
        ConfigError: the call raised it on rank 0; on every rank, as is an OSError.
        UserError: on the other ranks, for any other mistake of a user that rank 0 raises.
        MainFailed: on the other ranks, for any other error that rank 0 raises.
    """
    if not dist.is_initialized():
        return call()
    box: list[Any] = [None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            box = [("done", call())]
        except ConfigError as error:
            failure, box = error, [("config", (error.option, error.value, error.problem, error.fix))]
        except UserError as error:
            failure, box = error, [("user", str(error))]
        except OSError as error:
            failure, box = error, [("os", (error.errno, error.strerror, error.filename))]
        except BaseException as error:
            failure, box = error, [("error", brief(error))]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    kind, value = box[0]
    if kind == "config":
        raise ConfigError(*value)
    if kind == "user":
        raise UserError(value)
    if kind == "os":
        raise OSError(*value)
    if kind == "error":
        raise MainFailed(value)
    return value
