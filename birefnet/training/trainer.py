"""The `Trainer` of `birefnet train`.

It augments batches on the training device, validates photo by photo at the masks' own size, and can keep a moving
average of the weights.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path
from types import MethodType

import safetensors.torch
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from birefnet.training.augmentation import AugmentationSettings, augment_batch, resize_batch
from birefnet.training.dataset import MattingDataset, as_batch


logger = logging.getLogger(__name__)

AVERAGED_WEIGHTS = "averaged_weights.safetensors"
MAX_BAD_UPDATES = 10


class BiRefNetTrainer(Trainer):
    """Trains on a [`MattingDataset`] and validates on another one by MAE and mean IoU at the masks' own size.

    Args:
        size: Height and width of the training pictures in pixels, multiples of 32.
        size_range: Smallest and largest side in pixels of dynamic resolution. Each batch gets a random height and
            width, both multiples of 32 in this range. `None` trains at `size`.
        augmentation: Strength of the augmentation.
        backbone_learning_rate: Learning rate of the backbone. `None`: the same as for all other weights.
        average_decay: Decay of the exponential moving average of the weights, in [0, 1). 0 keeps no average.
            Validation and [`~BiRefNetTrainer.trained_model`] use the averaged weights.
        on_bad_loss: What to do with a batch whose loss is not finite: "skip" skips the update, "stop" raises.
        batch_statistics: Whether batch norms use the statistics of the batch and update their running statistics.
            If `False`, the running statistics are used and stay as they are. The same holds, whatever is given here,
            for batches of one photo, for a backbone that is not trained, and for a pretrained backbone that sees two
            scales: its running statistics would be a mix of both scales, which fits neither of them.
        kwargs: Arguments of `Trainer`. `processing_class` is the image processor; its mean and standard deviation
            normalize the pictures.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        size_range: tuple[int, int] | None = None,
        augmentation: AugmentationSettings | None = None,
        backbone_learning_rate: float | None = None,
        average_decay: float = 0.0,
        on_bad_loss: str = "skip",
        batch_statistics: bool = True,
        **kwargs,
    ):
        super().__init__(data_collator=as_batch, **kwargs)
        self.size, self.size_range = size, size_range
        self.augmentation = augmentation or AugmentationSettings()
        self.backbone_learning_rate = backbone_learning_rate
        self.on_bad_loss = on_bad_loss
        self.batch_statistics = batch_statistics
        self.keeps_backbone_statistics = not any(p.requires_grad for p in self.model.bb.parameters()) or (
            self.model.config.multi_scale_input is not None and has_statistics(self.model.bb)
        )
        self.bad_names: list[str] = []
        if self.args.device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)  # faster convolutions: docs/performance.md, "Training"
            if self.args.bf16:
                compute_depthwise_in_float32(self.model)
        self.average = self._new_average(average_decay) if average_decay else None
        self.loss_terms: dict[str, torch.Tensor | float] = defaultdict(float)
        self.loss_terms_steps = 0
        mean, deviation = self.processing_class.image_mean, self.processing_class.image_std
        self.mean, self.deviation = (
            torch.tensor(values, device=self.args.device)[:, None, None] for values in (mean, deviation)
        )
        self.add_callback(_UpdateCallback(self))

    @property
    def trained_model(self):
        """The model that validation measures: the averaged model if there is one, else the model itself."""
        return self.model if self.average is None else self.average.module

    def sample_matte(self, row: int) -> torch.Tensor:
        """A validation photo, its mask and its predicted matte, side by side: (3, H, 3·W) in [0, 1]."""
        batch = self.eval_dataset[row]
        matte = self._predict(self.trained_model.eval(), batch["pixel_values"])[0].cpu()
        photo, mask = (resize_batch(batch[key] / 255, self.size)[0] for key in ("pixel_values", "labels"))
        return torch.cat([photo, mask.expand(3, -1, -1), matte.expand(3, -1, -1)], dim=-1)

    # Averaged weights

    def _new_average(self, decay: float) -> AveragedModel:
        def blend(averaged: torch.Tensor, current: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
            if not averaged.is_floating_point():
                return current  # counters and index tables
            # The decay starts low. Otherwise the initial weights would stay in the average for long.
            return averaged.lerp(current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

        return AveragedModel(self.model, avg_fn=blend, use_buffers=True)

    def _save_checkpoint(self, model, trial):
        if self.average is not None and self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(_owned(self.average.state_dict()), folder / AVERAGED_WEIGHTS)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            path = os.path.join(resume_from_checkpoint, AVERAGED_WEIGHTS)
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path} is missing: the earlier run did not use --ema-decay.")
            self.average.load_state_dict(safetensors.torch.load_file(path))

    # Training

    def create_optimizer(self, model=None):
        """Makes two parameter groups: backbone and rest, each with its learning rate, both with weight decay."""
        if self.optimizer is None:
            trainable = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options["weight_decay"] = self.args.weight_decay
            groups = [{"params": [p for n, p in trainable if not _in_backbone(n)]}]
            backbone = [p for n, p in trainable if _in_backbone(n)]
            if backbone:
                rate = self.backbone_learning_rate
                groups.append({"params": backbone, "lr": self.args.learning_rate if rate is None else rate})
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images, labels = (_unit(inputs[key], self.args.device) for key in ("pixel_values", "labels"))
        with torch.no_grad():
            images, labels = augment_batch(images, labels, self._next_size(), self.augmentation)
        if not self.batch_statistics or len(images) == 1:
            freeze_statistics(model)
        elif self.keeps_backbone_statistics:
            freeze_statistics(self.model.bb)
        outputs = model(pixel_values=self._normalized(images), labels=labels)
        for name, value in outputs.loss_terms.items():
            self.loss_terms[name] = self.loss_terms[name] + value
        self.loss_terms_steps += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _normalized(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.deviation

    def _next_size(self) -> tuple[int, int]:
        if self.size_range is None:
            return self.size
        low, high = (side // 32 for side in self.size_range)
        return tuple(32 * int(side) for side in torch.randint(low, high + 1, (2,)))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self.bad_names += inputs["names"]
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self.loss_terms_steps:
            for name, total in self.loss_terms.items():
                logs[f"loss_{name}"] = float(total) / self.loss_terms_steps
            self.loss_terms, self.loss_terms_steps = defaultdict(float), 0
        super().log(logs, start_time)

    # Validation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Measures mean absolute error and mean intersection over union (of both binarized at 0.5).

        Both are measured at the masks' own size and averaged over the photos. Each process takes every n-th photo and
        only sums are kept, so the result does not depend on the number of processes or on the batch size.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.trained_model.eval()
        # Each process has its own running statistics. Those of the first process are saved, so measure with them.
        if self.args.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        rows = list(range(self.args.process_index, len(dataset), self.args.world_size))
        sums = torch.zeros(3, dtype=torch.float64)
        starts = range(0, len(rows), self.args.eval_batch_size)
        for start in tqdm(starts, "validation", leave=False, disable=self.args.disable_tqdm):
            batch_rows = rows[start : start + self.args.eval_batch_size]
            mattes = self._predict(model, dataset.__getitems__(batch_rows)["pixel_values"])
            for row, matte in zip(batch_rows, mattes, strict=True):
                sums += _errors(matte, dataset, row)
        mae, iou, count = self.accelerator.reduce(sums.float().to(self.args.device), "sum").tolist()
        metrics = {f"{metric_key_prefix}_mae": mae / count, f"{metric_key_prefix}_iou": iou / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _predict(self, model, pixels: torch.Tensor) -> torch.Tensor:
        """Photos (B, 3, H, W) in uint8 → mattes (B, 1, H, W) in [0, 1]."""
        images = resize_batch(_unit(pixels, self.args.device), self.size)
        with self.accelerator.autocast():
            return model(pixel_values=self._normalized(images)).logits.float().sigmoid()


class _UpdateCallback(TrainerCallback):
    """Skips updates whose loss is not finite. After each other update, updates the moving average."""

    def __init__(self, trainer: BiRefNetTrainer):
        self.trainer = trainer
        self.bad_updates = 0
        self.statistics: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # The forward pass changes running statistics before the loss is known. Keep a copy to restore.
        self.statistics = [buffer.clone() for buffer in _statistics(model)]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        bad = trainer.accelerator.reduce(torch.tensor(float(len(trainer.bad_names)), device=args.device), "sum")
        if not bad:
            self.bad_updates = 0
            return
        names, trainer.bad_names = ", ".join(trainer.bad_names), []
        message = (
            f"Step {state.global_step + 1}: the loss is not finite; the batch was: {names or 'of another process'}"
        )
        self.bad_updates += 1
        if trainer.on_bad_loss == "stop" or self.bad_updates >= MAX_BAD_UPDATES:
            raise FloatingPointError(f"{message}. The last checkpoint in {args.output_dir} is kept.")
        logger.warning("%s. This update is skipped.", message)
        # A gradient scaler skips the update by itself. It needs the gradients to detect the bad values.
        if trainer.accelerator.scaler is None:
            for parameter in model.parameters():
                parameter.grad = None
        for buffer, before in zip(_statistics(model), self.statistics, strict=True):
            buffer.copy_(before)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.trainer.average is not None and not self.bad_updates:
            self.trainer.average.update_parameters(model)


def _owned(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors. safetensors does not save tensors that share memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}


def compute_depthwise_in_float32(model):
    """Excludes the depthwise convolutions of a model from autocast.

    On a CPU their backward pass is up to 60 times slower in bfloat16 than in float32, which is a third of the embedded
    network's training step (docs/performance.md).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels > 1:
            module.forward = MethodType(_forward_in_float32, module)


def _forward_in_float32(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden_states.device.type, enabled=False):
        return type(module).forward(module, hidden_states.float()).to(hidden_states.dtype)


def freeze_statistics(model):
    """Makes batch norms use, and not update, their running statistics until the next call of `model.train()`."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def has_statistics(model) -> bool:
    """Whether a model has batch norms with statistics from a training. In a new model all means are 0."""
    norms = (m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    return any(norm.running_mean is not None and norm.running_mean.any() for norm in norms)


def _statistics(model) -> list[torch.Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _in_backbone(name: str) -> bool:
    return name.startswith("bb.")


def _unit(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    return pixels.to(device, non_blocking=True).float() / 255


def _errors(matte: torch.Tensor, dataset: MattingDataset, row: int) -> torch.Tensor:
    """Absolute error, intersection over union at 0.5, and 1 (to count) of a matte (1, h, w) at its mask's size."""
    mask = dataset.read_mask(row).to(matte.device)
    matte = F.interpolate(matte[None], mask.shape[-2:], mode="bilinear", align_corners=False)[0]
    found, true = matte > 0.5, mask > 0.5
    union = (found | true).sum()
    overlap = (found & true).sum() / union if union else torch.ones(())
    return torch.stack([(matte - mask).abs().mean().cpu(), overlap.cpu(), torch.ones(())]).double()
