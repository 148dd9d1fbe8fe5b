"""The transform of `on_host` for a device that encodes: the same resampling weights, applied as matrix products.

A device's own interpolation rounds pixel positions differently from the CPU's, which makes differences of 1e-4 on
noise. So the weights are taken from the CPU: resampling is linear in the pixels and works on rows and columns
independently, and resampling a unit matrix gives its weights.

Shape legend: F frames of one size, H x W pixels of a whole frame, h x w of the part that was cut out, S the input.
"""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from egopatch.extract.feed.clips import Cut
from egopatch.extract.video.planes import Colours
from egopatch.extract.video.transforms import Transform, Window

_SIZES = 64  # number of frame sizes whose weights are kept: 2 MB each at 1920x1080


class DeviceTransform:
    """Turns pixels on `device` into a network's input, within 1e-5 of the result of `on_host.to_input`.

    Args:
        transform: Transform of the network.
        size: Side of the input, S.
        device: Where the pixels are.
    """

    def __init__(self, transform: Transform, size: int, device: torch.device) -> None:
        self._transform = transform
        self._size = size
        self._device = device
        self._mean = torch.tensor(transform.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(transform.std, device=device).view(3, 1, 1)
        self._stages = functools.lru_cache(_SIZES)(self._find_stages)
        self._tables = functools.lru_cache(_SIZES)(self._find_tables)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, cut: Cut) -> Tensor:
        """Transform frames of one size.

        A device's rounding depends on the number of frames, so callers pass the same number each time where a clip's
        result must not depend on other clips.

        Args:
            pixels: uint8 [F, h, w, 3], or planes as `Planes.copy_to` leaves them, [F, 3 / 2 h w].
            cut: How the frames were cut; the window must contain what the transform looks at.

        Returns:
            float32 [F, 3, S, S], the normalised input.
        """
        x = pixels.permute(0, 3, 1, 2) if cut.colours is None else self._rgb(pixels, cut.window, cut.colours)
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        for rows, columns in self._stages(cut.whole, cut.window):
            x = rows @ x @ columns.T
            if self._transform.resampling == "bicubic":
                x = x.clamp_(0, 1)
        return x.sub_(self._mean).div_(self._std)

    def _rgb(self, planes: Tensor, window: Window, colours: Colours) -> Tensor:
        """`Planes.rgb` of each frame, float32 [F, 3, h, w]: float32 holds the whole numbers exactly."""
        rows, columns = window.height // 2, window.width // 2
        # As int32, since indexing by bytes would convert each to 64 bits; this also makes the parts contiguous.
        y, u, v = (part.int().view(-1) for part in planes.split([4 * rows * columns, *[rows * columns] * 2], dim=1))
        of_y, of_u, of_v = self._tables(colours)
        luma = of_y.index_select(1, y).view(-1, 1, rows, 2, columns, 2)
        chroma = of_u.index_select(1, u).add_(of_v.index_select(1, v)).view(3, -1, rows, 1, columns, 1)
        pixels = luma.new_empty(len(planes), 3, rows, 2, columns, 2)
        torch.add(luma, chroma.transpose(0, 1), out=pixels)
        return pixels.clamp_(0, 255).view(-1, 3, window.height, window.width)

    def _find_tables(self, colours: Colours) -> tuple[Tensor, Tensor, Tensor]:
        """Contributions to R, G and B: of Y, the same for all three, [1, 256]; of U and of V, [3, 256] each."""
        of_y, v_to_r, u_to_g, v_to_g, u_to_b = torch.from_numpy(colours.array().astype(np.float32))
        none = torch.zeros(256)
        of_u, of_v = torch.stack([none, u_to_g, u_to_b]), torch.stack([v_to_r, v_to_g, none])
        return of_y[None].to(self._device), of_u.to(self._device), of_v.to(self._device)

    def _find_stages(self, whole: tuple[int, int], window: Window) -> tuple[tuple[Tensor, Tensor], ...]:
        """(row weights, column weights) of each resizing; cubic ones are clamped in between, others merged into one.

        The first row weights also scale levels of 0 to 255 to [0, 1]: dividing all pixels would need another pass.
        """
        resized = self._transform.resized(*whole)
        crop = self._transform.crop(*resized)
        rows = self._weights(whole[0], resized[0], crop.top, crop.height, window.top, window.height)
        columns = self._weights(whole[1], resized[1], crop.left, crop.width, window.left, window.width)
        if self._transform.resampling != "bicubic":
            rows, columns = [rows[1] @ rows[0]], [columns[1] @ columns[0]]
        rows[0] = rows[0] / 255
        return tuple(
            (row.float().to(self._device), column.float().to(self._device))
            for row, column in zip(rows, columns, strict=True)
        )

    def _weights(self, extent: int, target: int, first: int, count: int, start: int, seen: int) -> list[Tensor]:
        """Weights [count, seen] of the first resizing and [S, count] of the second, along one axis, in float64."""
        whole = self._resampling(extent, target)[first : first + count]
        assert not whole[:, :start].any(), "the transform looks at pixels that were cut off"
        assert not whole[:, start + seen :].any(), "the transform looks at pixels that were cut off"
        return [whole[:, start : start + seen], self._resampling(count, self._size)]

    def _resampling(self, extent: int, target: int) -> Tensor:
        """[target, extent] float64: the weight of every pixel in each resampled pixel."""
        unit = torch.eye(extent)
        if target == extent:
            return unit.double()
        mode, antialias = self._transform.resampling, self._transform.antialias
        size = (target, extent)
        return F.interpolate(unit[None, None], size, mode=mode, align_corners=False, antialias=antialias)[0, 0].double()
