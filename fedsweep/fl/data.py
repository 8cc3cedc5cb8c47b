"""A data set in memory, and how its bytes become the numbers that a model sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageData:
    """Square images as bytes and their labels, all on one device."""

    name: str
    train_images: Tensor  # uint8 [N, C, S, S]
    train_labels: Tensor  # int64 [N], 0 … num_classes-1
    test_images: Tensor  # uint8 [M, C, S, S]
    test_labels: Tensor  # int64 [M]
    num_classes: int

    @property
    def in_channels(self) -> int:
        """Colour channels of an image."""
        return self.train_images.shape[1]

    @property
    def img_size(self) -> int:
        """Side of an image, in pixels."""
        return self.train_images.shape[-1]

    def to(self, device: str | torch.device) -> ImageData:
        """The same data on another device."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def normalised(images: Tensor) -> Tensor:
    """Bytes 0 … 255 as float32 from -1 to 1: (x / 255 - 0.5) / 0.5. Any shape."""
    return images.to(torch.float32).div_(255).sub_(0.5).mul_(2)  # times 2 is exactly divided by 0.5, and faster
