"""Low-rank adapters (LoRA) in the backbone, to fine-tune with less memory."""

from __future__ import annotations

import copy

from torch import nn


def add_low_rank_adapters(model, rank: int):
    """Freezes the backbone and adds trainable low-rank adapters to it, in place. Everything else stays trainable.

    The adapters are added to the backbone's linear layers. If it has none, they are added to its convolutions.

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
    # peft refuses a grouped convolution if the number of groups does not divide the rank.
    targets = targets or [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    rest = [p for name, p in model.named_parameters() if not name.startswith("bb.") and p.requires_grad]
    LoraModel(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), "default")
    for parameter in rest:
        parameter.requires_grad_(True)


def merged(model):
    """A copy of the model with its adapters merged into the weights. Without adapters, the model itself."""
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
