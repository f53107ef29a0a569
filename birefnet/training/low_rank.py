"""Low-rank adapters (LoRA) in the backbone, for fine-tuning where memory is short, and their merging."""

from __future__ import annotations

import copy

from torch import nn


def add_low_rank_adapters(model, rank: int):
    """Freezes the backbone and adds trainable low-rank adapters to it, in place; everything else keeps training.

    The adapters sit on the backbone's linear layers, or on its convolutions where it has no linear ones.

    Args:
        model: A `BiRefNetForImageSegmentation`.
        rank: Rank of the adapters, at least 1.

    Raises:
        ImportError: peft is not installed.
        ValueError: The rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"--lora-rank {rank} is below 1.")
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ImportError("--lora-rank needs peft: `pip install peft`.") from error

    layers = {f"bb.{name}": layer for name, layer in model.bb.named_modules()}
    targets = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    # peft refuses ranks that a grouped convolution's groups do not divide.
    targets = targets or [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    rest = [p for name, p in model.named_parameters() if not name.startswith("bb.") and p.requires_grad]
    LoraModel(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), "default")
    for parameter in rest:
        parameter.requires_grad_(True)


def merged(model):
    """The model with its adapters added to the weights: a copy, or the model itself where it has none."""
    if not hasattr(model, "peft_config"):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model
