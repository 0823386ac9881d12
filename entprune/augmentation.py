"""Light augmentation: each image is shifted a little, and every second colour image is mirrored.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image at random, repeating its border, and mirror every second one of those with 3 channels.

    Shifts reach an eighth of the side with 3 channels (4 pixels for 32x32), otherwise a fourteenth but at least one
    pixel (2 for 28x28): digits are centred, and mirroring changes what they say.

    Args:
        images: (n, c, h, w) on any device.
        generator: on the CPU; draws the same numbers whatever the device.

    Returns:
        New images of the same shape.
    """
    num_images, num_channels, height, width = images.shape
    is_colour = num_channels == 3
    fraction = 8 if is_colour else 14
    draws = [_draw_shifts(num_images, length, fraction, generator) for length in (height, width)]
    if is_colour:
        draws.append((torch.rand(num_images, generator=generator) < 0.5).long())
    drawn = torch.stack(draws).to(images.device)  # one transfer
    rows = _shifted_positions(drawn[0], height)
    columns = _shifted_positions(drawn[1], width)
    if is_colour:
        columns = torch.where(drawn[2].view(-1, 1) == 1, columns.flip(1), columns)
    image = torch.arange(num_images, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(num_channels, device=images.device).view(1, -1, 1, 1)
    return images[image, channel, rows.view(num_images, 1, height, 1), columns.view(num_images, 1, 1, width)]


def _draw_shifts(num_images: int, length: int, fraction: int, generator: torch.Generator) -> Tensor:
    reach = max(1, length // fraction)
    return torch.randint(-reach, reach + 1, (num_images,), generator=generator)


def _shifted_positions(shifts: Tensor, length: int) -> Tensor:
    """Source position of each row or column, (n, length), for shifts (n,)."""
    return (torch.arange(length, device=shifts.device) + shifts.view(-1, 1)).clamp_(0, length - 1)
