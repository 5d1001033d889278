"""What an export has written, and what storing its weights in fewer bits cost: as its model card tells it."""

import math
from dataclasses import dataclass

from distill.units import size


@dataclass(frozen=True)
class Quantised:
    """What storing weights in fewer bits cost, measured; losses in nats per token.

    Attributes:
        scheme: such as "int8 weight-only (torchao)".
        text: what it was measured on.
        tokens: how many predictions were scored.
        loss_before, loss_after: cross-entropy against the text.
        kl: KL(before ‖ after) of the next-token distributions.
        agreement: share of positions where both give the highest probability to the same token.
        bytes_before, bytes_after: of the weight files.
    """

    scheme: str
    text: str
    tokens: int
    loss_before: float
    loss_after: float
    kl: float
    agreement: float
    bytes_before: int
    bytes_after: int

    def told(self) -> list[str]:
        """For the terminal and the card alike."""
        before, after = (math.exp(loss) for loss in (self.loss_before, self.loss_after))
        return [
            f"{self.scheme}: weight files {size(self.bytes_before)} → {size(self.bytes_after)}",
            f"perplexity {before:.4f} → {after:.4f} (loss {self.loss_before:.4f} → {self.loss_after:.4f}), "
            f"KL {self.kl:.2e}, same likeliest token at {self.agreement:.2%} of positions; "
            f"{self.tokens:,} tokens of {self.text}",
        ]


@dataclass(frozen=True)
class Written:
    """The folder that the card stands in.

    Attributes:
        place: what a reader passes to ``from_pretrained``: a Hub id, or the folder's name.
        format: a key of ``distill.export.formats.FORMATS``.
        n_bytes: of its weight files.
        file: the name of the weights where they are one file of a name of their own.
        quantised: what quantising them cost, where they are.
    """

    place: str
    format: str
    n_bytes: int
    file: str | None = None
    quantised: Quantised | None = None

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]
