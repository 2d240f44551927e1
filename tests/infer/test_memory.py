"""Room for weights on a device, which the ranks of a host share where it is the CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.errors import ConfigError
from mmtrain.infer import memory
from mmtrain.infer.memory import check_room, free_for_rank, weight_bytes
from tests.model.small import small_config

CPU = torch.device("cpu")


def test_ranks_share_what_the_host_has_free() -> None:
    model = meta_model(small_config())
    needed = weight_bytes(model)
    with mock.patch.object(memory, "free_bytes", lambda device: 2 * needed + 1):
        check_room(model, CPU, 2)
        check_room(model, CPU, 1, beside=needed)
        for given in (dict(ranks=3), dict(beside=needed + 2), dict(ranks=2, beside=1)):
            with pytest.raises(ConfigError, match=r"--device=cpu: has .* GiB of memory free, the weights take"):
                check_room(model, CPU, **given)
        assert free_for_rank(torch.device("cuda"), 4) == 2 * needed + 1  # each has a GPU of its own
    with mock.patch.object(memory, "free_bytes", lambda device: None):
        check_room(model, CPU, 8)
