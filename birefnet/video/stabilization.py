"""Mattes that are steady from frame to frame.

The matte of the frame before follows the photo by optical flow and is blended into the matte of this frame, where the
flow is consistent and the photo did not change. Nothing else is blended, so nothing trails behind a fast subject.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


STRENGTH = 0.8  # share of the frame before where nothing speaks against it
# Sundaram, Brox and Keutzer, "Dense Point Trajectories by GPU-Accelerated Large Displacement Optical Flow", ECCV 2010:
# forward and backward flow agree where the squared length of their sum is below 0.01 of their squared lengths + 0.5.
RELATIVE_TOLERANCE, TOLERANCE = 0.01, 0.5
COLOUR_TOLERANCE = 20.0  # gray levels by which colours may differ, noise and compression included
NEIGHBOURHOOD = 5  # side of the square over which colour differences are averaged, in pixels
_CLAMP = 1e-6  # mattes stay this far from 0 and 1 as they are turned into logits


class Stabilizer:
    """
    Blends each frame's matte with that of the frame before, at the size that the network sees.

    Call it with frame after frame. It keeps one matte and one frame.

    Args:
        strength (`float`, *optional*): From 0 to below 1, the weight of the frame before where flow and colours agree.
    """

    def __init__(self, strength: float = STRENGTH):
        import cv2

        if not 0 <= strength < 1:
            raise ValueError(f"`strength` must be from 0 to below 1, got {strength}")
        self.strength = strength
        self.matte: np.ndarray | None = None  # (h, w), float32
        self.photo: np.ndarray | None = None  # (h, w, 3), uint8
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def __call__(self, logits: torch.Tensor, photo: Image.Image) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(1, 1, h, w)`): What the network says of the frame.
            photo (`PIL.Image.Image`): The frame, of any size.

        Returns:
            `torch.Tensor` of shape `(1, 1, h, w)`: Logits of the stabilised matte, float32, on the same device.
        """
        matte = logits[0, 0].float().sigmoid().cpu().numpy()
        small = np.asarray(photo.resize(matte.shape[::-1], Image.Resampling.BILINEAR))
        if self.matte is not None and self.matte.shape == matte.shape:
            matte = self._blended(matte, small)
        self.matte, self.photo = matte, small
        blended = torch.from_numpy(matte).to(logits.device).clamp(_CLAMP, 1 - _CLAMP)
        return torch.logit(blended)[None, None]

    def _blended(self, matte: np.ndarray, photo: np.ndarray) -> np.ndarray:
        import cv2

        now, before = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (photo, self.photo))
        backward, forward = self._flow.calc(now, before, None), self._flow.calc(before, now, None)  # (h, w, 2)
        places = backward + _grid(*matte.shape)  # where each pixel was in the frame before
        # Bilinear interpolation would blur the matte a little more with every frame.
        history = cv2.remap(self.matte, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).clip(0, 1)
        weight = self.strength * flow_consistency(backward, forward, places)
        weight *= colour_consistency(photo, cv2.remap(self.photo, places, None, cv2.INTER_LINEAR))
        return matte + weight * (history - matte)

    def state(self) -> dict[str, np.ndarray]:
        """What the next frame depends on, for `restore`."""
        return {} if self.matte is None else {"matte": self.matte.copy(), "photo": self.photo.copy()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from a `state` as if the frames before had just been seen."""
        self.matte, self.photo = state.get("matte"), state.get("photo")


def flow_consistency(backward: np.ndarray, forward: np.ndarray, places: np.ndarray) -> np.ndarray:
    """
    How far each pixel's flow is undone by the flow in the other direction, as it is unless something was covered.

    Args:
        backward: Flow from this frame to the one before in pixels, (h, w, 2), float32.
        forward: Flow from the frame before to this one, of the same shape.
        places: Where each pixel was in the frame before (x, y), of the same shape.

    Returns:
        Weights from 0 to 1, (h, w), float32; 0 for pixels that were outside the picture.
    """
    import cv2

    height, width = backward.shape[:2]
    returned = cv2.remap(forward, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    error = ((backward + returned) ** 2).sum(-1)
    lengths = (backward**2).sum(-1) + (returned**2).sum(-1)
    inside = (places >= 0).all(-1) & (places[..., 0] <= width - 1) & (places[..., 1] <= height - 1)
    return np.exp(-error / (RELATIVE_TOLERANCE * lengths + TOLERANCE)) * inside


def colour_consistency(photo: np.ndarray, warped: np.ndarray) -> np.ndarray:
    """
    How far the frame before, moved along the flow, has the colours of this frame.

    Args:
        photo, warped: (h, w, 3), uint8.

    Returns:
        Weights from 0 to 1, (h, w), float32.
    """
    import cv2

    difference = cv2.absdiff(photo, warped).max(-1).astype(np.float32)
    difference = cv2.blur(difference, (NEIGHBOURHOOD, NEIGHBOURHOOD))
    return np.exp(-((difference / COLOUR_TOLERANCE) ** 2))


def _grid(height: int, width: int) -> np.ndarray:
    """(x, y) of each pixel: (height, width, 2), float32."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
