"""Mattes that are steady from frame to frame.

The mattes of the frames before and of the next frame follow the photo by optical flow. They are blended into the matte
of this frame where the flow is consistent and the colours did not change, so nothing trails behind a fast subject.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image


STRENGTH = 0.8  # weight of another frame where nothing speaks against it
# Sundaram, Brox and Keutzer, "Dense Point Trajectories by GPU-Accelerated Large Displacement Optical Flow", ECCV 2010:
# forward and backward flow agree where the squared length of their sum is below 0.01 of their squared lengths + 0.5.
RELATIVE_TOLERANCE, TOLERANCE = 0.01, 0.5
COLOUR_TOLERANCE = 20.0  # gray levels by which colours may differ, noise and compression included
NEIGHBOURHOOD = 5  # side of the square over which colour differences are averaged, in pixels
_CLAMP = 1e-6  # mattes stay this far from 0 and 1 as they are turned into logits


class Stabilizer:
    """
    Blends each frame's matte with those of the frames before it and of the next one, at the network's size.

    Frames go in one by one with `step`, which gives the result of the frame before, and `finish` gives the last one.
    The frames before count through one matte that is carried along, so memory is two frames.

    Args:
        strength (`float`, *optional*): From 0 to below 1, the weight of another frame where flow and colours agree.
    """

    def __init__(self, strength: float = STRENGTH):
        import cv2

        if not 0 <= strength < 1:
            raise ValueError(f"`strength` must be from 0 to below 1, got {strength}")
        self.strength = strength
        self.photo: np.ndarray | None = None  # the last frame, (h, w, 3), uint8
        self.matte: np.ndarray | None = None  # its matte blended with the frames before it, (h, w), float32
        self._own: np.ndarray | None = None  # its matte as the network gave it; `None` if its result is out already
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def step(self, logits: torch.Tensor, photo: Image.Image) -> torch.Tensor | None:
        """
        Takes a frame.

        Args:
            logits (`torch.Tensor` of shape `(1, 1, h, w)`): What the network says of the frame.
            photo (`PIL.Image.Image`): The frame, of any size.

        Returns:
            `torch.Tensor` of shape `(1, 1, h, w)`: Logits of the steady matte of the frame before, float32, on the
            CPU. `None` if there is no such frame, or its result was out before `restore`.
        """
        own = logits[0, 0].float().sigmoid().cpu().numpy()
        small = np.asarray(photo.resize(own.shape[::-1], Image.Resampling.BILINEAR))
        result, matte = None, own
        if self.matte is not None:
            now, before = _gray(small), _gray(self.photo)
            backward, forward = self._flow.calc(now, before, None), self._flow.calc(before, now, None)  # (h, w, 2)
            if self._own is not None:
                future = self._blended(self._own, own, self.photo, small, forward, backward)
                result = _to_logits((self.matte + future) / 2)
            matte = self._blended(own, self.matte, small, self.photo, backward, forward)
        self._own, self.matte, self.photo = own, matte, small
        return result

    def finish(self) -> torch.Tensor | None:
        """The result of the last frame, as `step` gives it."""
        return None if self._own is None else _to_logits(self.matte)

    def _blended(self, matte, other_matte, photo, other_photo, flow, flow_back) -> np.ndarray:
        """The matte of a frame blended with that of another one; `flow` leads from the frame to the other one."""
        import cv2

        places = flow + _grid(*matte.shape)  # where each pixel is in the other frame
        # Bilinear interpolation would blur the matte a little more with every frame.
        moved = cv2.remap(other_matte, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).clip(0, 1)
        weight = self.strength * flow_consistency(flow, flow_back, places)
        weight *= colour_consistency(photo, cv2.remap(other_photo, places, None, cv2.INTER_LINEAR))
        return matte + weight * (moved - matte)

    def state(self) -> dict[str, np.ndarray]:
        """What the next frames depend on, for `restore`."""
        return {} if self.matte is None else {"matte": self.matte, "photo": self.photo}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from a `state` as if the frames before had just been seen, and their results taken."""
        self.matte, self.photo, self._own = state.get("matte"), state.get("photo"), None


def _gray(photo: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)


def _to_logits(matte: np.ndarray) -> torch.Tensor:
    return torch.logit(torch.from_numpy(matte).clamp(_CLAMP, 1 - _CLAMP))[None, None]


def flow_consistency(flow: np.ndarray, flow_back: np.ndarray, places: np.ndarray) -> np.ndarray:
    """
    How far each pixel's flow is undone by the flow in the other direction, as it is unless something was covered.

    Args:
        flow: Flow from this frame to another one in pixels, (h, w, 2), float32.
        flow_back: Flow from the other frame to this one, of the same shape.
        places: Where each pixel is in the other frame (x, y), of the same shape.

    Returns:
        Weights from 0 to 1, (h, w), float32; 0 for pixels that were outside the picture.
    """
    import cv2

    height, width = flow.shape[:2]
    returned = cv2.remap(flow_back, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    error = _squared_length(flow + returned)
    lengths = _squared_length(flow) + _squared_length(returned)
    x, y = cv2.split(places)
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    return np.exp(-error / (RELATIVE_TOLERANCE * lengths + TOLERANCE)) * inside


def colour_consistency(photo: np.ndarray, warped: np.ndarray) -> np.ndarray:
    """
    How far another frame, moved along the flow, has the colours of this frame.

    Args:
        photo, warped: (h, w, 3), uint8.

    Returns:
        Weights from 0 to 1, (h, w), float32.
    """
    import cv2

    red, green, blue = cv2.split(cv2.absdiff(photo, warped))
    largest = cv2.max(cv2.max(red, green), blue).astype(np.float32)
    difference = cv2.blur(largest, (NEIGHBOURHOOD, NEIGHBOURHOOD))
    return np.exp(-((difference / COLOUR_TOLERANCE) ** 2))


def _squared_length(vectors: np.ndarray) -> np.ndarray:
    """(h, w, 2) to (h, w)."""
    import cv2

    x, y = cv2.split(vectors)
    return x * x + y * y


@functools.lru_cache(maxsize=4)
def _grid(height: int, width: int) -> np.ndarray:
    """(x, y) of each pixel: (height, width, 2), float32."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
