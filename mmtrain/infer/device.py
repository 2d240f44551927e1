"""Device to decode on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mmtrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

_FIX = "give cpu, cuda, or cuda:N"


def check_device_name(name: str | None) -> None:
    """Refuse a name that is no device to decode on, without loading torch.

    Raises:
        ConfigError: it is neither cpu nor cuda nor cuda:N.
    """
    if name is not None and not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", name):
        raise ConfigError("--device", name, "not a device that decoding runs on", _FIX)


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name; None is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: not a name of a device, or this machine has no such device.
    """
    import torch

    check_device_name(name)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name or ("cuda" if found else "cpu"))
    if device.type == "cuda" and found == 0:
        raise ConfigError("--device", name, "torch sees no GPU on this machine", "leave it out, or give cpu")
    if device.type == "cuda" and (device.index or 0) >= found:
        known = "cuda:0" if found == 1 else f"cuda:0 to cuda:{found - 1}"
        raise ConfigError("--device", name, f"torch sees {found} GPU{'s' * (found > 1)}", f"give {known}")
    return device
