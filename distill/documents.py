"""Where documents begin in a packed sequence, read off the positions as Hugging Face models read it."""

import torch
from torch import Tensor
from torch.nn import functional as F


def document_starts(position_ids_BT: Tensor, valid_BT: Tensor | None = None) -> Tensor | None:
    """True where a position does not follow the one before it: another document begins.

    The rule is the one ``transformers.masking_utils`` uses for packed sequences, so that attention layers and mixers
    of one model always agree. Borders to padding do not count: left-padded prompts are not packed.

    Returns:
        resets_BT, or None where nothing is packed.
    """
    if position_ids_BT.ndim != 2 or position_ids_BT.shape[1] < 2:
        return None
    resets_BT = F.pad(position_ids_BT.diff(dim=1) != 1, (1, 0))
    if valid_BT is not None:
        resets_BT = resets_BT & valid_BT & F.pad(valid_BT[:, :-1], (1, 0))
    return resets_BT if bool(resets_BT.any()) else None


def beginnings(document_BT: Tensor) -> Tensor:
    """Where the document of each position begins, from a document number per position: it changes where one begins."""
    starts_BT = F.pad(document_BT.diff(dim=1) != 0, (1, 0), value=True)
    here_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    return torch.where(starts_BT, here_T, 0).cummax(dim=1).values


def positions_from_index(seq_idx_BT: Tensor) -> Tensor:
    """Positions that restart with every document, from a document number per position."""
    return torch.arange(seq_idx_BT.shape[1], device=seq_idx_BT.device) - beginnings(seq_idx_BT)
