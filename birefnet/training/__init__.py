"""`birefnet train`: training and fine-tuning with the transformers Trainer.

Here are the trainer, the data set, augmentation, LoRA adapters, ImageNet weights and the card of the result.
"""

from birefnet.training.dataset import MattingDataset
from birefnet.training.trainer import BiRefNetTrainer


__all__ = ["BiRefNetTrainer", "MattingDataset"]
