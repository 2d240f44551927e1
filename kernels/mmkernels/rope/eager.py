"""The rotation in plain torch: float32 inside (float64 for float64 inputs).

Legend: T tokens, H heads, K head width, R rotated dimensions, R2 = R / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_THK: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, inverse: bool) -> Tensor:
    """The rotated heads, contiguous, in the dtype of x; ``inverse`` turns the other way."""
    acc = torch.float64 if x_THK.dtype == torch.float64 else torch.float32
    half = cos_TR2.shape[1]
    cos, sin = cos_TR2[:, None], (-sin_TR2 if inverse else sin_TR2)[:, None]
    first, second = x_THK[..., :half].to(acc), x_THK[..., half : 2 * half].to(acc)
    out_THK = torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device)
    out_THK[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out_THK[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    out_THK[..., 2 * half :] = x_THK[..., 2 * half :]
    return out_THK
