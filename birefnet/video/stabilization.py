"""Mattes that are steady from frame to frame.

The mattes of the frames before and of the next few frames follow the photo by optical flow. The steady matte is their
weighted mean. A frame counts less where the flow is not consistent or the colours changed, so nothing trails behind a
fast subject.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


STRENGTH = 0.9  # weight of a neighbour, relative to the frame's own, where nothing speaks against it
AHEAD = 3  # frames after a frame that count for its matte
# Sundaram, Brox and Keutzer, "Dense Point Trajectories by GPU-Accelerated Large Displacement Optical Flow", ECCV 2010:
# forward and backward flow agree where the squared length of their sum is below 0.01 of their squared lengths + 0.5.
RELATIVE_TOLERANCE, TOLERANCE = 0.01, 0.5
COLOUR_TOLERANCE = 20.0  # gray levels by which colours may differ, noise and compression included
NEIGHBOURHOOD = 5  # side of the square over which colour differences are averaged, in pixels
_CLAMP = 1e-6  # mattes stay this far from 0 and 1 as they are turned into logits


@dataclass
class _Link:
    """How a frame's pixels are found in a neighbour: the places (h, w, 2) as (x, y), and how far to trust them."""

    places: np.ndarray
    weight: np.ndarray


@dataclass
class _Seen:
    """A frame at the network's size, (h, w) each.

    Attributes:
        photo: RGB, uint8, (h, w, 3).
        own: The network's matte, float32. `None` for a frame of which `restore` knows only what later frames need.
        past: Mean of the own matte and the mattes of all frames before.
        past_weight: Sum of the weights in this mean; the own matte has the weight 1.
        to_next: The way to the next frame, as soon as there is one.
    """

    photo: np.ndarray
    own: np.ndarray | None
    past: np.ndarray
    past_weight: np.ndarray
    to_next: _Link | None = None


class Stabilizer:
    """
    Averages each frame's matte with those of the frames before it and of the next ones, at the network's size.

    Frames go in one by one with `step`, which gives the result of an earlier frame. `finish` gives those of the last
    frames. The frames before count through one mean that is carried along, so memory is `ahead` + 1 frames.

    Args:
        strength (`float`, *optional*, defaults to 0.9): From 0 to below 1, the weight of the next frame where flow and
            colours agree. The frame's own weight is 1. The frame after the next has the square of this weight, and so
            on. 0 leaves every matte as it is.
        ahead (`int`, *optional*, defaults to 3): How many later frames count, 0 or more. Results are this many frames
            late.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(self, strength: float = STRENGTH, ahead: int = AHEAD):
        import cv2

        if not 0 <= strength < 1:
            raise ValueError(f"`strength` must be from 0 to below 1, got {strength}")
        if ahead < 0:
            raise ValueError(f"`ahead` must be 0 or more, got {ahead}")
        self.strength, self.ahead = strength, ahead
        self._last: _Seen | None = None
        self._waiting: deque[_Seen] = deque()  # frames without a result yet, the oldest first
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def step(self, logits: torch.Tensor, photo: Image.Image) -> torch.Tensor | None:
        """
        Takes a frame.

        Args:
            logits (`torch.Tensor` of shape `(1, 1, h, w)`): What the network says of the frame.
            photo (`PIL.Image.Image`): The frame, mode RGB, of any size.

        Returns:
            `torch.Tensor` of shape `(1, 1, h, w)`: Logits of the steady matte of the frame that is `ahead` frames
            before this one, float32, on the CPU. `None` where there is no such frame, or its result was out before
            `restore`.
        """
        import cv2

        own = logits[0, 0].float().sigmoid().cpu().numpy()
        small = cv2.resize(np.asarray(photo), own.shape[::-1], interpolation=cv2.INTER_AREA)
        frame = _Seen(small, own, own, np.ones_like(own))
        if self._last is not None:
            to_last, self._last.to_next = self._links(small, self._last.photo)
            frame.past, frame.past_weight = _mean(own, self._last.past, self._last.past_weight, to_last)
        self._last = frame
        self._waiting.append(frame)
        return self._result() if len(self._waiting) > self.ahead else None

    def finish(self) -> list[torch.Tensor]:
        """The results of the frames that `step` gave none for yet, in order and of the same kind."""
        return [self._result() for _ in range(len(self._waiting))]

    def _links(self, photo: np.ndarray, before: np.ndarray) -> tuple[_Link, _Link]:
        """The ways from a frame to the frame before it and back."""
        now, then = _gray(photo), _gray(before)
        backward, forward = self._flow.calc(now, then, None), self._flow.calc(then, now, None)  # (h, w, 2) each
        return self._link(photo, before, backward, forward), self._link(before, photo, forward, backward)

    def _link(self, photo: np.ndarray, other: np.ndarray, flow: np.ndarray, flow_back: np.ndarray) -> _Link:
        """The way from a frame to another one, to which `flow` leads."""
        import cv2

        places = flow + _grid(*flow.shape[:2])
        weight = self.strength * flow_consistency(flow, flow_back, places)
        weight *= colour_consistency(photo, cv2.remap(other, places, None, cv2.INTER_LINEAR))
        return _Link(places, weight)

    def _result(self) -> torch.Tensor:
        """The steady logits of the oldest frame that waits."""
        newest = self._waiting[-1]
        future, future_weight = newest.own, np.ones_like(newest.own)
        for frame in list(self._waiting)[-2::-1]:
            future, future_weight = _mean(frame.own, future, future_weight, frame.to_next)
        first = self._waiting.popleft()
        total = first.past_weight + future_weight - 1  # both means contain the own matte
        return _to_logits((first.past * first.past_weight + future * future_weight - first.own) / total)

    def state(self) -> dict[str, np.ndarray]:
        """What later frames depend on, for `restore`: arrays (h, w) and (h, w, 3). Empty before the first frame."""
        last = self._last
        return {} if last is None else {"photo": last.photo, "past": last.past, "past_weight": last.past_weight}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from a `state` as if the frames before had just been seen, and their results taken."""
        self._last = _Seen(own=None, **state) if state else None
        self._waiting.clear()


def _mean(own: np.ndarray, other: np.ndarray, other_weight: np.ndarray, link: _Link) -> tuple[np.ndarray, np.ndarray]:
    """Adds a neighbour's mean matte, moved along the way to it, to a frame's own matte. Gives the mean and its weight.

    All arrays are (h, w), float32.
    """
    import cv2

    # Bilinear interpolation would blur the matte a little more with every frame.
    moved = cv2.remap(other, link.places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).clip(0, 1)
    weight = cv2.remap(other_weight, link.places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    weight *= link.weight
    total = 1 + weight
    return (own + weight * moved) / total, total


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
    x, y = places[..., 0], places[..., 1]
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
    squares = vectors * vectors
    return squares[..., 0] + squares[..., 1]


@functools.lru_cache(maxsize=4)
def _grid(height: int, width: int) -> np.ndarray:
    """(x, y) of each pixel: (height, width, 2), float32."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
