"""Documents of a packed row on a fixed grid of chunks: masks where a boundary falls, and states per document.

Shape letters: T tokens, H heads, D width of q and k, E width of v, N chunks of a segment, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmkernels.lightning.eager.decay import powers
from mmkernels.lightning.eager.plan import Segment

# (q, k, v, slopes, document ids, state before the row) -> (output, state after the row); first and last [1, H, D, E].
RowAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SegmentMasks:
    """0/1 factors, in the accumulation dtype, for a segment in which documents change. All heads share them.

    "Entering" is the state after the token before a chunk, "leaving" the state after its last token.

    Attributes:
        same_NCC: both tokens are of one document.
        lead_NC1: the token's document is the one the entering state belongs to.
        tail_NC1: the token's document is the one the leaving state belongs to.
        leaving_NN: the leaving states of two chunks belong to one document.
        entering_NN: the entering states of two chunks belong to one document.
        through_N: the entering state of the chunk reaches its leaving state.
    """

    same_NCC: Tensor
    lead_NC1: Tensor
    tail_NC1: Tensor
    leaving_NN: Tensor
    entering_NN: Tensor
    through_N: Tensor


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 [T]: the index of each token's document. Documents of length 0 have no token and only skip an index."""
    ends = cu_seqlens[1:].contiguous()
    positions = torch.arange(tokens, dtype=ends.dtype, device=ends.device)
    return torch.bucketize(positions, ends, out_int32=True, right=True)


def segment_masks(ids_T: Tensor, segment: Segment, dtype: torch.dtype) -> SegmentMasks | None:
    """Masks of a segment, or None when one document runs from the token before it to its last token."""
    before = max(segment.start - 1, 0)
    # On a GPU the comparison would wait for the device: there every segment gets its masks.
    if ids_T.device.type == "cpu" and ids_T[before].item() == ids_T[segment.stop - 1].item():
        return None
    ids_NC = ids_T[segment.start : segment.stop].view(segment.chunks, segment.length)
    last_N1 = ids_NC[:, -1:]
    enter_N1 = torch.cat([ids_T[before : before + 1], last_N1[:-1, 0]])[:, None]
    return SegmentMasks(
        same_NCC=(ids_NC[:, :, None] == ids_NC[:, None, :]).to(dtype),
        lead_NC1=(ids_NC == enter_N1).to(dtype).unsqueeze(-1),
        tail_NC1=(ids_NC == last_N1).to(dtype).unsqueeze(-1),
        leaving_NN=(last_N1 == last_N1.T).to(dtype),
        entering_NN=(enter_N1 == enter_N1.T).to(dtype),
        through_N=(enter_N1 == last_N1)[:, 0].to(dtype),
    )


def attend_documents(
    q_1THD: Tensor,
    k_1THD: Tensor,
    v_1THE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor,
    initial_NHDE: Tensor | None,
    output_final_state: bool,
    attend: RowAttention,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention of a packed row with a state per document, given attention with one state per row.

    The row's own state serves the document of its first token and that of its last, which is all that context
    parallelism asks for. Attention is linear in the state, so the other documents' states enter and leave by products
    of their own (plain autograd), at the cost of 2 D E more operations a token each way, paid only when asked for.
    Needs the values of ``cu_seqlens`` on the host when states are given or asked for.
    """
    tokens = q_1THD.shape[1]
    ids_T = document_ids(cu_seqlens, tokens)
    if initial_NHDE is None and not output_final_state:
        return attend(q_1THD, k_1THD, v_1THE, slopes_H, ids_T, None)[0], None
    offsets = cu_seqlens.tolist()
    lengths = [hi - lo for lo, hi in pairwise(offsets)]
    nonempty = [n for n, length in enumerate(lengths) if length]
    first, last = (nonempty[0], nonempty[-1]) if nonempty else (0, 0)
    initial_1HDE = None if initial_NHDE is None else initial_NHDE[first : first + 1]
    o_1THE, final_1HDE = attend(q_1THD, k_1THD, v_1THE, slopes_H, ids_T, initial_1HDE)
    if initial_NHDE is not None and len(nonempty) > 1:
        o_1THE = o_1THE + _from_initial(q_1THD, slopes_H, lengths, first, initial_NHDE, o_1THE)
    if not output_final_state:
        return o_1THE, None
    finals = []
    k_docs, v_docs = k_1THD[0].split(lengths), v_1THE[0].split(lengths)
    for n, length in enumerate(lengths):
        if nonempty and n == last:
            final_HDE, has_initial = final_1HDE[0], n == first
        else:
            final_HDE, has_initial = _local_final(k_docs[n], v_docs[n], slopes_H, final_1HDE), False
        if initial_NHDE is not None and not has_initial:
            final_HDE = final_HDE + powers(slopes_H, length, 1, final_HDE.dtype)[0, :, :, None] * initial_NHDE[n]
        finals.append(final_HDE)
    return o_1THE, torch.stack(finals)


def _from_initial(
    q_1THD: Tensor, slopes_H: Tensor, lengths: list[int], first: int, initial_NHDE: Tensor, like_1THE: Tensor
) -> Tensor:
    """Part of the output that comes from the initial states of all documents but the first non-empty, [1, T, H, E]."""
    acc, pieces = initial_NHDE.dtype, []
    # split (not slices): its backward is one concatenation, where N slices would each fill a gradient of T tokens.
    for n, q_LHD in enumerate(q_1THD[0].split(lengths)):
        if n == first:
            pieces.append(like_1THE.new_zeros(lengths[n], *like_1THE.shape[2:], dtype=acc))
        else:
            scaled_LHD = q_LHD.to(acc) * powers(slopes_H, 1, lengths[n], acc)
            pieces.append(torch.matmul(scaled_LHD.transpose(0, 1), initial_NHDE[n]).transpose(0, 1))
    return torch.cat(pieces)[None].to(like_1THE.dtype)


def _local_final(k_LHD: Tensor, v_LHE: Tensor, slopes_H: Tensor, like_1HDE: Tensor) -> Tensor:
    """State after a document that started from zero, [H, D, E]."""
    acc = like_1HDE.dtype
    scaled_LHD = k_LHD.to(acc) * powers(slopes_H, 0, k_LHD.shape[0], acc).flip(0)
    return torch.matmul(scaled_LHD.permute(1, 2, 0), v_LHE.to(acc).transpose(0, 1))
