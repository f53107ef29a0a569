"""BiRefNet: Bilateral Reference for High-Resolution Dichotomous Image Segmentation (https://arxiv.org/abs/2401.03407)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .backbone_birefnet import SwinTransformer, WindowAttention, create_backbone, relative_position_index
from .checkpoint_birefnet import (
    check_backbone,
    check_layout,
    clean_state_dict,
    config_from_state_dict,
    locate_foreign_checkpoint,
    read_checkpoint,
)
from .configuration_birefnet import BiRefNetConfig
from .decoder_birefnet import BiRefNetDecoder, DecoderBlock
from .deformable_birefnet import ATTENTION_BLOCKS, ZeroInitializedConvolution
from .hardware_birefnet import ConvertedWeights, can_record, compute_plan
from .layers_birefnet import resize
from .loss_birefnet import BiRefNetLoss, task_loss_weights
from .recording_birefnet import RecordedCalls


if TYPE_CHECKING:  # never runs; makes transformers copy these files when it saves or pushes the model
    from .image_processing_birefnet import BiRefNetImageProcessor  # noqa: F401
    from .pipeline_birefnet import BiRefNetPipeline  # noqa: F401


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass
class BiRefNetImageSegmentationOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `(1,)`, returned when `labels` are given):
            In training the sum of all losses of the task; in evaluation the pixel losses of `logits`.
        logits (`torch.Tensor` of shape `(B, 1, H, W)`):
            The matte is their sigmoid.
        hidden_states (`tuple[torch.Tensor]`, returned with `output_hidden_states=True`):
            The encoder's four maps, shallowest first. The deepest includes the context of the other three.
        loss_terms (`dict[str, torch.Tensor]`, returned when `labels` are given):
            The weighted terms of `loss`, detached.
        auxiliary_logits (`tuple[torch.Tensor]`, in training with `multi_scale_supervision`):
            Logits (B, 1, h, w) of stages 4, 3, 2 at strides 32, 16, 8.
        gradient_logits, gradient_targets (`tuple[torch.Tensor]`, in training with `gradient_reference`):
            Predicted gradients (B, 1, h, w) of stages 4, 3, 2 and their targets (B, 1, H, W), before the sigmoid.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    auxiliary_logits: tuple[torch.Tensor, ...] | None = None
    gradient_logits: tuple[torch.Tensor, ...] | None = None
    gradient_targets: tuple[torch.Tensor, ...] | None = None


class BiRefNetPreTrainedModel(PreTrainedModel):
    config_class = BiRefNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    # These modules use the parameters of their children directly, so they have to stay on one device.
    _no_split_modules = ("SwinBlock", "PatchMerging", "DecoderBlock", "ASPPDeformable", "ASPP", "BiRefNetDecoder")
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialise as the published code does: Swin's initialisation, PyTorch's defaults for convolutions."""
        if isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
            init.copy_(module.relative_position_index, relative_position_index(module.window_size))
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ZeroInitializedConvolution):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            super()._init_weights(module)
        elif hasattr(module, "init_non_persistent_buffers"):  # timm's buffers, which the meta device loses
            module.init_non_persistent_buffers()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, state_dict=None, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`]. Also loads a single `.safetensors` or `.pth` file and the
        official repositories. Their `config.json` does not describe the network; it is inferred from the tensors.

        Raises:
            ValueError: The weights have the old layout, or another backbone than `config` names.
        """
        if pretrained_model_name_or_path is not None and state_dict is None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            if file := locate_foreign_checkpoint(pretrained_model_name_or_path, **options):
                state_dict = clean_state_dict(read_checkpoint(file))
                config = config or config_from_state_dict(state_dict)
                check_layout(state_dict)
                check_backbone(config, state_dict)
                kwargs.setdefault("dtype", dtype_of(state_dict))
                pretrained_model_name_or_path = None
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, state_dict=state_dict, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
            load_blocks_whole(model)
        if model.config.freeze_backbone:  # loading has replaced the frozen parameters by new ones
            model.bb.requires_grad_(False)
        return loaded

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in PyTorch. Also accepts prefixes of wrapped models, and index buffers that are missing or in float16."""
        state_dict = clean_state_dict(state_dict)
        if any(key.startswith("bb.") for key in state_dict):
            check_layout(state_dict)
            check_backbone(self.config, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        if hasattr(self.bb, "set_grad_checkpointing"):  # a timm backbone
            self.bb.set_grad_checkpointing(enable)
        super()._set_gradient_checkpointing(enable, **kwargs)


class BiRefNetForImageSegmentation(BiRefNetPreTrainedModel):
    """
    BiRefNet: predicts the matte of an image's foreground. Backbone, squeeze block, and decoder with a bilateral
    reference.

    Example:

    ```python
    >>> import torch
    >>> from PIL import Image
    >>> from transformers import AutoImageProcessor, AutoModelForImageSegmentation

    >>> model = AutoModelForImageSegmentation.from_pretrained("path/to/this/folder", trust_remote_code=True).eval()
    >>> processor = AutoImageProcessor.from_pretrained("path/to/this/folder", trust_remote_code=True)
    >>> photo = Image.open("photo.jpg")
    >>> with torch.inference_mode():
    ...     outputs = model(**processor(photo, return_tensors="pt"))
    >>> matte = processor.post_process_alpha_matte(outputs, target_sizes=[photo.size[::-1]])[0]  # (height, width)
    ```
    """

    def __init__(self, config: BiRefNetConfig):
        super().__init__(config)
        self.bb, channels, has_one_stride = create_backbone(config)
        if config.multi_scale_input == "concat":
            channels = tuple(2 * c for c in channels)
        context_channels = sum(channels) if config.context_levels else channels[-1]
        if config.squeeze_block is not None:
            self.squeeze_module = nn.Sequential(create_squeeze_block(config, context_channels, channels[-1]))
        self.decoder = BiRefNetDecoder(config, channels, needs_neck=has_one_stride)
        self.loss_function = BiRefNetLoss(task_loss_weights(config.task, config.loss_weights))
        self.recorded_calls = RecordedCalls()
        if config.freeze_backbone:
            self.bb.requires_grad_(False)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BiRefNetImageSegmentationOutput | tuple:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images normalised with ImageNet's mean and standard deviation. H and W are multiples of 32. The images
                are cast to the weights' dtype.
            labels (`torch.Tensor` of shape `(B, 1, H, W)` or `(B, H, W)`, *optional*):
                Masks or mattes in [0, 1].
            output_hidden_states (`bool`, *optional*):
                Whether to return the encoder's maps.
            return_dict (`bool`, *optional*):
                Whether to return a [`BiRefNetImageSegmentationOutput`] instead of a tuple.

        Raises:
            ValueError: `pixel_values` or `labels` have another shape, dtype or range.
        """
        check_pixel_values(pixel_values)
        if labels is not None:
            labels = check_labels(labels, pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        returns_logits_only = labels is None and not output_hidden_states and not self.training
        if returns_logits_only and can_record(pixel_values):
            logits = self.recorded_calls.compute(
                self, lambda images: self.compute_as_planned(images).logits, pixel_values
            )
            output = BiRefNetImageSegmentationOutput(logits=logits)
        else:
            if not torch.compiler.is_compiling():
                self.recorded_calls.clear()  # frees its memory
            output = self.compute_as_planned(pixel_values, labels, output_hidden_states)
        return output if return_dict else output.to_tuple()

    def compute_as_planned(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BiRefNetImageSegmentationOutput:
        """The forward pass in the dtype that is best on this device, with checked arguments."""
        computes_as_stored = self.training or torch.compiler.is_compiling()
        arithmetic = self.dtype if computes_as_stored else compute_plan(pixel_values.device, self.dtype).arithmetic
        if arithmetic == self.dtype:
            return self.compute(pixel_values.to(self.dtype), labels, output_hidden_states)
        with ConvertedWeights(self.dtype, arithmetic):  # half-precision weights on a CPU without that arithmetic
            output = self.compute(pixel_values.to(arithmetic), labels, output_hidden_states)
        output.logits = output.logits.to(self.dtype)
        if output.hidden_states is not None:
            output.hidden_states = tuple(maps.to(self.dtype) for maps in output.hidden_states)
        return output

    def compute(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None, output_hidden_states: bool
    ) -> BiRefNetImageSegmentationOutput:
        """The forward pass in the dtype of `pixel_values`, with checked arguments."""
        laterals, x4 = self.encode(pixel_values)
        features = [*(self.join_scales(*maps) for maps in laterals), x4] if output_hidden_states else []
        if self.config.squeeze_block is not None:
            x4 = self.squeeze_module(x4)
        logits, training_outputs = self.decoder(laterals, x4, pixel_values)

        loss = loss_terms = None
        if labels is not None:
            loss, loss_terms = self.loss_function(
                [*training_outputs.get("auxiliary_logits", ()), logits],
                labels,
                training_outputs.get("gradient_logits"),
                training_outputs.get("gradient_targets"),
            )
        return BiRefNetImageSegmentationOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(features) or None,
            loss_terms=loss_terms,
            **training_outputs,
        )

    def encode(self, pixel_values: torch.Tensor) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:
        """
        Encode images (B, 3, H, W).

        Returns:
            The maps x1, x2, x3, each a tuple of the map of the image and, with multi-scale input, the map of the
            half-size image; and the map x4, scales joined and the context of the other maps concatenated.
        """
        laterals = list(self.extract_features(pixel_values))
        x4 = self.join_scales(*laterals.pop())
        if self.config.context_levels:
            x4 = torch.cat([*(self.join_scales(*maps, size=x4.shape[-2:]) for maps in laterals), x4], dim=1)
        if self.decoder.needs_neck:
            laterals = [(self.join_scales(*maps),) for maps in laterals]
        return laterals, x4

    def extract_features(self, pixel_values: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        if self.config.multi_scale_input is None:
            return [(full,) for full in self.bb(pixel_values)]
        height, width = pixel_values.shape[-2:]
        half = resize(pixel_values, (height // 2, width // 2))
        # In training, stochastic depth drops the branches of each scale on its own. In an exported graph, the batch
        # may be symbolic, and other runtimes were verified with one scale after the other.
        if isinstance(self.bb, SwinTransformer) and not self.training and not torch.compiler.is_exporting():
            return self.bb(pixel_values, half)
        return list(zip(self.bb(pixel_values), self.bb(half), strict=True))

    def join_scales(
        self, full: torch.Tensor, half: torch.Tensor | None = None, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """
        Concatenate or add the map of the image and the map of the half-size image, if there is one.

        The result has `size`, by default the size of `full`.
        """
        own_size = full.shape[-2:]
        full = resize(full, size or own_size)
        if half is None:
            return full
        half = resize(resize(half, own_size), size or own_size)
        return full + half if self.config.multi_scale_input == "add" else torch.cat([full, half], dim=1)


def load_blocks_whole(model: PreTrainedModel):
    """
    Make each block with offloaded weights fetch all of them when it is called.

    accelerate fetches weights when their own layer is called. The blocks use their layers' weights directly, without
    calling the layers.
    """
    try:  # outside a `try`, transformers would require accelerate of every user
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
        from accelerate.utils import PrefixedDataset
    except ImportError as error:
        raise ImportError("Offloaded weights need accelerate: `pip install accelerate`.") from error
    whole: list[str] = []
    for name, block in model.named_modules():
        if type(block).__name__ not in model._no_split_modules or name.startswith(tuple(whole)):
            continue
        hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]
        hook = next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)
        if hook is None:
            continue
        whole.append(f"{name}.")
        weights = PrefixedDataset(hook.weights_map.dataset, f"{name}.")
        remove_hook_from_module(block, recurse=True)
        options = {"weights_map": weights, "offload_buffers": hook.offload_buffers, "place_submodules": True}
        add_hook_to_module(block, AlignDevicesHook(hook.execution_device, offload=True, **options))


def dtype_of(state_dict: dict[str, torch.Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point())


def create_squeeze_block(config: BiRefNetConfig, in_channels: int, out_channels: int) -> nn.Module:
    if config.squeeze_block in ATTENTION_BLOCKS:
        return ATTENTION_BLOCKS[config.squeeze_block](in_channels, out_channels)
    return DecoderBlock(config, in_channels, out_channels, config.squeeze_block)


def check_pixel_values(pixel_values: torch.Tensor):
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 4 or shape[1] != 3:
        raise ValueError(f"pixel_values have shape {shape}; allowed is (batch, 3, height, width).")
    if shape[0] == 0:
        raise ValueError(f"pixel_values have shape {shape}: the batch is empty; at least one image is needed.")
    if shape[2] % 32 or shape[3] % 32 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"pixel_values have height {shape[2]} and width {shape[3]}; both must be multiples of 32.")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values have dtype {pixel_values.dtype}; allowed are floating-point dtypes.")


def check_labels(labels: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Check the labels, and return them as (B, 1, H, W) in floating point."""
    shape = tuple(labels.shape)
    if labels.ndim == 3:
        labels = labels.unsqueeze(1)
    batch, _, height, width = pixel_values.shape
    if tuple(labels.shape) != (batch, 1, height, width):
        allowed = f"{(batch, 1, height, width)} or {(batch, height, width)}"
        raise ValueError(f"labels have shape {shape}; allowed for these pixel_values is {allowed}.")
    labels = labels if labels.is_floating_point() else labels.float()
    # A compiled graph cannot read values, so they are not checked there.
    if not torch.compiler.is_compiling():
        lowest, highest = labels.aminmax()
        if not (lowest >= 0 and highest <= 1):  # also true of NaN
            raise ValueError(f"labels lie in [{lowest:g}, {highest:g}]; allowed is [0, 1].")
    return labels


BiRefNetForImageSegmentation.register_for_auto_class("AutoModelForImageSegmentation")

__all__ = ["BiRefNetForImageSegmentation", "BiRefNetImageSegmentationOutput", "BiRefNetPreTrainedModel"]
