"""Values of patches, such as saliency, as a map over the pixels of a frame."""

from numbers import Integral

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from egopatch.features.common.units import counted
from egopatch.features.values.errors import one_line, require_type

Box = tuple[float, float, float, float]  # top, left, height, width in pixels


def to_pixels(
    values: Tensor,
    grid: tuple[int, int],
    height: int,
    width: int,
    box: Box | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Spread values of patches over the pixels of a frame, bilinearly between the patches' centres.

    Args:
        values: [..., N], such as `PatchTokens.saliency`.
        grid: (rows, cols) of the patches of a whole frame, `store.spec.grid`.
        height: Height of the frame in pixels.
        width: Width of the frame in pixels.
        box: (top, left, height, width) in pixels of the part that the patches cover; None: the whole frame.
        positions: [..., N], index of each patch in the grid, in a derived store that keeps only some of them.

    Returns:
        float32 [..., height, width]; NaN where the encoder saw nothing, and where patches that a derived store does not
        keep would have most of the weight.

    Raises:
        TypeError: `values` is not a tensor, or the grid, the frame or the box is of the wrong type.
        ValueError: The grid or the frame is empty, the number of values differs from the grid's, `positions` does not
            give each value an index in the grid, or the box is empty or not inside the frame.
    """
    require_type("values", values, Tensor, "a tensor: torch.from_numpy(array)")
    try:
        rows, cols = grid
    except (TypeError, ValueError):
        raise TypeError(f"grid is {one_line(grid)}; expected (rows, cols): store.spec.grid") from None
    for name, side in (("height", height), ("width", width)):
        require_type(name, side, Integral, "a whole number of pixels")
    if min(rows, cols, height, width) < 1:
        raise ValueError(f"grid is {grid} and the frame has {height} x {width} pixels; expected sides of at least 1")
    values = values.float()
    kept = torch.ones_like(values)
    if positions is not None:
        if positions.shape != values.shape or not ((positions >= 0) & (positions < rows * cols)).all():
            given = f"shape {tuple(positions.shape)} and indices from {positions.min()} to {positions.max()}"
            raise ValueError(f"positions has {given}; expected {tuple(values.shape)}, and indices in the grid {grid}")
        whole, index = values.new_zeros(*values.shape[:-1], rows * cols), positions.long()
        values, kept = whole.scatter(-1, index, values), whole.scatter(-1, index, kept)
    if values.shape[-1] != rows * cols:
        raise ValueError(
            f"values has {counted(values.shape[-1], 'patch', 'patches')} a frame; "
            f"expected {rows * cols}, as in the grid {grid}"
        )
    try:
        top, left, box_height, box_width = (0.0, 0.0, height, width) if box is None else box
    except (TypeError, ValueError):
        raise TypeError(f"box is {one_line(box)}; expected (top, left, height, width) in pixels") from None
    if not (-0.5 <= top < top + box_height <= height + 0.5 and -0.5 <= left < left + box_width <= width + 0.5):
        raise ValueError(f"box is {box}; expected one inside the frame of {height} x {width} pixels")
    # Centres of the pixels, in a box from -1 to 1.
    y = (torch.arange(height) + 0.5 - top) / box_height * 2 - 1
    x = (torch.arange(width) + 0.5 - left) / box_width * 2 - 1
    where = torch.stack(torch.broadcast_tensors(x[None], y[:, None]), dim=-1).to(values.device)
    maps = rearrange([values * kept, kept], "two ... (rows cols) -> (...) two rows cols", rows=rows)
    spread = functional.grid_sample(
        maps, where.expand(len(maps), -1, -1, -1), "bilinear", "border", align_corners=False
    )
    total, weight = spread.unbind(dim=1)
    unseen = (where.abs() > 1).any(dim=-1) | (weight < 0.5)
    return (total / weight).masked_fill(unseen, torch.nan).view(*values.shape[:-1], height, width)
