"""Pairs of photo and mask as batches of 8-bit tensors of one size."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from birefnet.data.pairs import BadPairError, Pair, decode_mask, decode_pair


logger = logging.getLogger(__name__)


class MattingDataset(torch.utils.data.Dataset):
    """Photos and masks of one size, as batches of 8-bit tensors.

    The constructor decodes each pair once to find bad pairs. With `cache` it keeps the resized pictures, so later
    epochs decode nothing.

    Args:
        pairs: The pairs. Bad ones are skipped.
        size: Height and width in pixels to resize photos and masks to.
        on_bad_data: "skip" reports a bad pair and skips it; "stop" raises.
        cache: Whether to keep the resized pictures in memory: 4·height·width bytes for each pair. `None`: if they fit
            into half of the free memory.
        workers: Number of threads that decode.
        show_progress: Whether to show a progress bar on a terminal.

    Attributes:
        pairs: The good pairs in the given order.

    Raises:
        BadPairError: A pair is bad and `on_bad_data` is "stop".
        ValueError: No pair is good.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: tuple[int, int],
        on_bad_data: str = "skip",
        cache: bool | None = None,
        workers: int | None = None,
        show_progress: bool = True,
    ):
        self.size = size
        self.workers = workers or os.cpu_count() or 1
        if cache is None:
            cache = len(pairs) * 4 * size[0] * size[1] < free_memory() / 2
        pixels = torch.empty((len(pairs), 4, *size), dtype=torch.uint8) if cache else None
        kept = self._decode_all(pairs, pixels, on_bad_data, show_progress)
        if not kept:
            raise ValueError(f"None of the {len(pairs)} pairs of photo and mask can be used.")
        self.pairs = [pairs[row] for row in kept]
        if cache and len(kept) < len(pairs):
            pixels = pixels[kept]
        self.pixels = pixels  # (N, 4, height, width): red, green, blue, mask

    def _decode_all(
        self, pairs: Sequence[Pair], pixels: torch.Tensor | None, on_bad_data: str, show_progress: bool
    ) -> list[int]:
        """Fills `pixels` and returns the rows of the good pairs."""

        def decode(row: int) -> BadPairError | None:
            try:
                squared = resize_pair(*decode_pair(pairs[row]), self.size)
            except BadPairError as error:
                return error
            if pixels is not None:
                pixels[row] = squared

        kept, bad = [], 0
        hidden = None if show_progress else True  # None hides the bar unless the output is a terminal.
        with ThreadPoolExecutor(self.workers) as threads:
            outcomes = threads.map(decode, range(len(pairs)))
            for row, error in enumerate(tqdm(outcomes, "reading photos", len(pairs), disable=hidden)):
                if error is None:
                    kept.append(row)
                elif on_bad_data == "stop":
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise error
                else:
                    bad += 1
                    logger.warning("Skipped: %s", error)
        if bad:
            logger.warning("%d of %d pairs were skipped.", bad, len(pairs))
        return kept

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor | list[str]]:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> dict[str, torch.Tensor | list[str]]:
        """A batch: `pixel_values` (B, 3, H, W) and `labels` (B, 1, H, W), both uint8, and `names`."""
        if self.pixels is None:
            with ThreadPoolExecutor(self.workers) as threads:
                pixels = torch.stack(list(threads.map(self._read_row, rows)))
        else:
            pixels = self.pixels[torch.as_tensor(rows, device=self.pixels.device)]
        names = [self.pairs[row].name for row in rows]
        return {"pixel_values": pixels[:, :3], "labels": pixels[:, 3:], "names": names}

    def read_mask(self, row: int) -> torch.Tensor:
        """A row's mask at its own size: (1, h, w) floats in [0, 1]."""
        return torch.from_numpy(np.array(decode_mask(self.pairs[row])))[None] / 255

    def _read_row(self, row: int) -> torch.Tensor:
        return resize_pair(*decode_pair(self.pairs[row]), self.size)


def resize_pair(photo: Image.Image, mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Resizes like the image processor (bilinear, antialiased). Returns a uint8 tensor (4, height, width)."""
    height, width = size
    resized = [np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)) for picture in (photo, mask)]
    return torch.from_numpy(np.concatenate([resized[0].transpose(2, 0, 1), resized[1][None]]))


def as_batch(batch: dict) -> dict:
    """The data loader's collate function. It does nothing: `MattingDataset` returns whole batches."""
    return batch


def free_memory() -> int:
    """Free memory in bytes, divided by the number of training processes on this machine."""
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
