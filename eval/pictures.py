"""Mixing matrices as small pictures: what each position takes from every earlier one, on a log scale.

Zero is dark, taking is bright blue to white, taking away (negative entries, which attention cannot have)
is red; the future is transparent. The scale is symmetric and spans DECADES factors of ten.
"""

import base64
import io

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import imsave
from numpy.typing import NDArray

DECADES = 3
COLOURS = LinearSegmentedColormap.from_list(
    "mixing",
    [
        (0.00, "#ffd9cf"),
        (0.18, "#f0674f"),
        (0.38, "#7a1f2b"),
        (0.50, "#10151f"),
        (0.62, "#123f77"),
        (0.80, "#2f9bd6"),
        (1.00, "#eefcd2"),
    ],
)


def matrix_picture(matrix_TS: NDArray[np.float16], largest: float) -> str:
    """A PNG data URI, one pixel an entry; entries beyond ``largest`` are clipped to it."""
    values_TS = np.nan_to_num(matrix_TS.astype(np.float64), nan=0.0)
    rgba_TS4 = COLOURS(0.5 + 0.5 * _signed_log(values_TS, largest), bytes=True)
    rgba_TS4[..., 3] = np.where(np.tri(*matrix_TS.shape), 255, 0)
    return _png(rgba_TS4)


def scale_picture() -> str:
    """The colour scale from −largest to +largest as a PNG data URI, one pixel high."""
    return _png(COLOURS(np.linspace(0, 1, 129)[None], bytes=True))


def _signed_log(values: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """sign(v) · (1 + log10(|v| / largest) / DECADES), 0 below the scale and at most 1."""
    if not largest:
        return np.zeros_like(values)
    floor = largest * 10.0**-DECADES
    size = 1 + np.log10(np.maximum(np.abs(values), floor) / largest) / DECADES
    return np.sign(values) * np.clip(size, 0, 1)


def _png(rgba: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    imsave(buffer, rgba, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
