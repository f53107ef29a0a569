"""The training of `train.py`."""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from birefnet import repository_folder
from birefnet.data.pairs import read_pairs
from birefnet.hub.folders import write_folder, written_whole
from birefnet.inference.loading import load_model
from birefnet.training.augmentation import resize_batch, size_before_crop
from birefnet.training.dataset import MattingDataset
from birefnet.training.trainer import freeze_statistics


# Losses of the last training runs of the embedded weights (docs/embedded-weights.md).
LOSS_WEIGHTS = {"bce": 30.0, "iou": 1.5, "ssim": 10.0, "mae": 10.0}
WARM_UP = 0.03  # share of the time in which the learning rate rises
SECONDS_TO_END = 12  # last validation, last files
FILE_BYTES = 14 * 2**20  # of one file of weights
CARD = "# BiRefNet\n\nTrained by `benchmarks/gpu/train.sh`.\n"


class Training:
    """One training: network, data in memory, optimizer, moving average, and the course so far."""

    def __init__(self, arguments: argparse.Namespace, end: float):
        torch.manual_seed(arguments.seed)
        self.arguments, self.end = arguments, end
        self.device = torch.device(arguments.device)
        self.model, self.processor = load_model(arguments.model or repository_folder())
        self.model.to(self.device, memory_format=torch.channels_last).train()
        if self.model.config.multi_scale_input is not None:
            freeze_statistics(self.model.bb)  # they would become a mix of both scales, as in `birefnet train`
        self.model.loss_function.weights = dict(LOSS_WEIGHTS)
        self.size = (arguments.size or self.processor.size["height"],) * 2
        mean, deviation = self.processor.image_mean, self.processor.image_std
        self.mean, self.deviation = (torch.tensor(v, device=self.device)[:, None, None] for v in (mean, deviation))
        options = {"cache": True, "show_progress": False}
        stored = (arguments.stored_side,) * 2
        self.pixels = MattingDataset(read_pairs(arguments.data), stored, **options).pixels.to(self.device)
        self.validation = MattingDataset(read_pairs(arguments.validation_data), self.size, **options)
        self.network = torch.compile(self.model) if arguments.compile else self.model
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay), use_buffers=True
        )
        self.optimizer = self.new_optimizer()
        self.rows = torch.empty(0, dtype=torch.long, device=self.device)  # of the present epoch, not yet used
        self.photos, self.losses, self.bad_updates, self.curve = 0, [], 0, []

    def new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with two rates, as `birefnet train` makes it."""
        backbone = [p for name, p in self.model.named_parameters() if name.startswith("bb.")]
        others = [p for name, p in self.model.named_parameters() if not name.startswith("bb.")]
        groups = [
            {"params": others, "highest": self.arguments.learning_rate},
            {"params": backbone, "highest": self.arguments.backbone_learning_rate},
        ]
        return torch.optim.AdamW(groups, weight_decay=self.arguments.weight_decay, fused=self.device.type == "cuda")

    def run(self):
        self.validate(0.0)
        self.update(0.0)  # compiles the network
        begin = last = time.monotonic()
        while (progress := self.progress_since(begin)) < 1:
            if time.monotonic() - last > self.arguments.validate_every:
                self.validate(progress)
                last = time.monotonic()
            self.update(progress)
        self.validate(1.0)

    def progress_since(self, begin: float) -> float:
        """Share of the training that is done: of the time from `begin` on, and in a tiny training of four updates."""
        if self.arguments.tiny:
            return self.photos / (4 * self.arguments.batch_size)
        stop = self.end - SECONDS_TO_END
        return (time.monotonic() - begin) / (stop - begin) if begin < stop else 1.0

    def update(self, progress: float):
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * rate(progress)
        images, masks = augment(self.pixels[self.next_rows()], self.size, self.arguments.crop, self.arguments.color)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.network(pixel_values=self.normalized(images), labels=masks).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        if norm.isfinite():
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.losses.append(loss.detach())
        else:
            self.bad_updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.photos += len(images)

    def next_rows(self) -> torch.Tensor:
        """Rows of a batch. Each epoch has a new order; its last, incomplete batch is left out."""
        if len(self.rows) < self.arguments.batch_size:
            self.rows = torch.randperm(len(self.pixels), device=self.device)
        batch, self.rows = self.rows.split([self.arguments.batch_size, len(self.rows) - self.arguments.batch_size])
        return batch

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def validate(self, progress: float):
        """Mean absolute error of the averaged weights at the masks' own size. Keeps the weights if they are best."""
        model = self.average.module.eval()
        errors = []
        for first in range(0, len(self.validation), self.arguments.batch_size):
            rows = range(first, min(first + self.arguments.batch_size, len(self.validation)))
            images = self.validation.__getitems__(rows)["pixel_values"].to(self.device).float() / 255
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = model(self.normalized(images)).logits
            for row, matte in zip(rows, logits.float().sigmoid(), strict=True):
                mask = self.validation.read_mask(row)
                matte = F.interpolate(matte[None], mask.shape[-2:], mode="bilinear")[0].cpu()
                errors.append((matte - mask).abs().mean().item())
        point = {
            "progress": progress,
            "epochs": self.photos / len(self.pixels),
            "photos": self.photos,
            "loss": torch.stack(self.losses).mean().item() if self.losses else None,
            "mae": sum(errors) / len(errors),
            "seconds_left": self.end - time.monotonic(),
            "bad_updates": self.bad_updates,
        }
        self.losses = []
        self.curve.append(point)
        print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in point.items()}), flush=True)
        self.write(is_best=point["mae"] <= min(earlier["mae"] for earlier in self.curve))

    def write(self, is_best: bool):
        folder = self.arguments.output
        folder.mkdir(parents=True, exist_ok=True)
        options = {name: str(value) for name, value in vars(self.arguments).items()}
        (folder / "curve.json").write_text(json.dumps({"options": options, "curve": self.curve}, indent=1) + "\n")
        draw_curve(self.curve, folder / "curve.png")
        if is_best:
            write_weights(self.average.module.state_dict(), folder)


def rate(progress: float) -> float:
    """Share of the highest learning rate: rises from 0, then falls along a cosine to 0 (`schedule="cosine"`)."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def augment(pixels, size: tuple[int, int], crop: float, color: float):
    """
    Flips, crops and changes the colours of each pair in its own way, on the pixels' device.

    Args:
        pixels: (B, 4, h, w) in bytes: red, green, blue, mask.
        size: Height and width of the result.
        crop: Smallest share of a side that is kept.
        color: Largest change of brightness, contrast and saturation.

    Returns:
        Images (B, 3, height, width) and masks (B, 1, height, width) in [0, 1].
    """
    count, device = len(pixels), pixels.device
    pixels = resize_batch(pixels.float() / 255, size_before_crop(size, crop))
    kept = 1 - (1 - crop) * torch.rand(count, device=device)
    mirror = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    # The crop's centre lies so that the crop is inside the photo, whose sides reach from -1 to 1.
    shift = (1 - kept)[:, None] * (2 * torch.rand(count, 2, device=device) - 1)
    matrix = torch.zeros(count, 2, 3, device=device)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = kept * mirror, kept, shift
    grid = F.affine_grid(matrix, (count, 4, *size), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    images, masks = pixels.clamp(0, 1).split((3, 1), dim=1)
    brightness, contrast, saturation = 1 + color * (2 * torch.rand(3, count, 1, 1, 1, device=device) - 1)
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    gray = images.mean(dim=1, keepdim=True)
    return (gray + (images - gray) * saturation).clamp(0, 1), masks


def write_weights(state_dict: dict, folder: Path):
    """Write floating-point tensors in float16, into as many files as keep each below `FILE_BYTES`."""
    parts, size = [{}], 0
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        tensor = tensor.half() if tensor.is_floating_point() else tensor.clone()
        if size and size + tensor.nbytes > FILE_BYTES:
            parts, size = [*parts, {}], 0
        parts[-1][name], size = tensor, size + tensor.nbytes
    for number, part in enumerate(parts, start=1):
        save_file(part, folder / f"weights-{number}.safetensors")


def assemble(results: Path, folder: Path, source: str | None):
    """Write a new model folder with the weights that a training of `source` wrote, for `birefnet evaluate --model`."""
    model, processor = load_model(source or repository_folder())
    files = sorted(results.glob("weights-*.safetensors"))
    if not files:
        raise SystemExit(f"{results} has no weights-*.safetensors")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    model.load_state_dict({name: v.float() if v.is_floating_point() else v for name, v in weights.items()})
    with written_whole(folder) as partial:
        write_folder(partial, model.half(), processor, CARD)


def draw_curve(curve: list[dict], file: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for panel, name, title in zip(
        figure.subplots(1, 2), ("mae", "loss"), ("validation: mean absolute error", "training: mean loss"), strict=True
    ):
        points = [(point["epochs"], point[name]) for point in curve if point[name] is not None]
        panel.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", markersize=3)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
