"""BiRefNet model configuration."""

from transformers import PreTrainedConfig


SWIN_BACKBONES = {
    # name: embedding dimension, depths, attention heads, window size
    "swin_v1_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_v1_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_v1_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_v1_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}

DINO_V3_BACKBONES = {
    # name: timm model, blocks whose outputs are the four feature maps
    "dino_v3_s": ("vit_small_patch16_dinov3.lvd1689m", (3, 5, 7, 11)),
    "dino_v3_s_plus": ("vit_small_plus_patch16_dinov3.lvd1689m", (3, 5, 7, 11)),
    "dino_v3_b": ("vit_base_patch16_dinov3.lvd1689m", (3, 5, 7, 11)),
    "dino_v3_l": ("vit_large_patch16_dinov3.lvd1689m", (5, 11, 17, 23)),
    "dino_v3_h_plus": ("vit_huge_plus_patch16_dinov3.lvd1689m", (7, 15, 23, 31)),
    "dino_v3_7b": ("vit_7b_patch16_dinov3.lvd1689m", (9, 19, 29, 39)),
}

ALLOWED_VALUES = {
    "multi_scale_input": ("concat", "add", None),
    "context_levels": (3, 0),
    "squeeze_block": ("basic", "residual", "aspp", "aspp_deformable", None),
    "decoder_block": ("basic", "residual"),
    "decoder_attention": ("aspp_deformable", "aspp", None),
    "source_reference": ("patches", "image", None),
    "gradient_reference": (True, False),
    "multi_scale_supervision": (True, False),
    "freeze_backbone": (True, False),
    "task": ("dis", "general", "matting"),
}

LOSS_TERMS = ("bce", "iou", "ssim", "mae")

# Several Auto classes map to one class, because transformers may remove AutoModelForImageSegmentation.
AUTO_MAP = {
    "AutoConfig": "configuration_birefnet.BiRefNetConfig",
    "AutoModel": "modeling_birefnet.BiRefNetForImageSegmentation",
    "AutoModelForImageSegmentation": "modeling_birefnet.BiRefNetForImageSegmentation",
    "AutoModelForSemanticSegmentation": "modeling_birefnet.BiRefNetForImageSegmentation",
    "AutoImageProcessor": "image_processing_birefnet.BiRefNetImageProcessor",
}

CUSTOM_PIPELINES = {
    "background-removal": {
        "impl": "pipeline_birefnet.BiRefNetPipeline",
        "pt": ["AutoModelForImageSegmentation"],
        "type": "image",
    }
}


class BiRefNetConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BiRefNetForImageSegmentation`].

    The defaults describe the official general checkpoint (Swin-L, 220 M parameters). With `backbone="swin_v1_t"` they
    describe the official lite checkpoint (44 M parameters).

    Args:
        backbone (`str`, *optional*, defaults to `"swin_v1_l"`):
            The encoder: `"swin_v1_t"`, `"swin_v1_s"`, `"swin_v1_b"`, `"swin_v1_l"`; `"dino_v3_s"`,
            `"dino_v3_s_plus"`, `"dino_v3_b"`, `"dino_v3_l"`, `"dino_v3_h_plus"`, `"dino_v3_7b"`; or the name of any
            timm model that offers `features_only`.
        multi_scale_input (`str`, *optional*, defaults to `"concat"`):
            How features of the half-size image are combined with those of the full-size image: `"concat"`, `"add"`,
            or `None` for a single scale.
        context_levels (`int`, *optional*, defaults to 3):
            Number of shallower feature maps concatenated to the deepest one: 3 or 0.
        squeeze_block (`str`, *optional*, defaults to `"basic"`):
            Block between encoder and decoder: `"basic"`, `"residual"`, `"aspp"`, `"aspp_deformable"`, or `None`
            (only with `context_levels=0`).
        decoder_block (`str`, *optional*, defaults to `"basic"`):
            Block of every decoder stage: `"basic"` or `"residual"`.
        decoder_attention (`str`, *optional*, defaults to `"aspp_deformable"`):
            Atrous spatial pyramid pooling inside the blocks: `"aspp_deformable"`, `"aspp"`, or `None`.
        decoder_channels (`int`, *optional*, defaults to 64):
            Channels inside a block; `None` stands for a quarter of the block's input channels.
        source_reference (`str`, *optional*, defaults to `"patches"`):
            Form in which every decoder stage takes the input image: `"patches"` (cut into patches stacked as
            channels), `"image"` (resized), or `None`.
        gradient_reference (`bool`, *optional*, defaults to `True`):
            Whether image gradients supervise and gate the decoder stages. Requires `multi_scale_supervision`.
        multi_scale_supervision (`bool`, *optional*, defaults to `True`):
            Whether the three deeper decoder stages predict a mask in training.
        drop_path_rate (`float`, *optional*, defaults to 0.2):
            Stochastic depth rate of the last block of a Swin backbone, in [0, 1). The rate rises linearly from 0 over
            the blocks. Other backbones have no stochastic depth.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether the backbone's parameters are excluded from training.
        task (`str`, *optional*, defaults to `"general"`):
            Task whose loss weights are used: `"dis"` (also for COD and HRSOD), `"general"` or `"matting"`.
        loss_weights (`dict[str, float]`, *optional*):
            Weights of the loss terms `"bce"`, `"iou"`, `"ssim"`, `"mae"` in place of the task's. A missing term has
            weight 0.

    Raises:
        ValueError: A field has an unknown value, or two fields exclude each other.

    Example:

    ```python
    >>> from transformers import AutoConfig
    >>> config = AutoConfig.from_pretrained("path/to/this/folder", trust_remote_code=True, task="matting")
    ```
    """

    model_type = "birefnet"

    backbone: str = "swin_v1_l"
    multi_scale_input: str | None = "concat"
    context_levels: int = 3
    squeeze_block: str | None = "basic"
    decoder_block: str = "basic"
    decoder_attention: str | None = "aspp_deformable"
    decoder_channels: int | None = 64
    source_reference: str | None = "patches"
    gradient_reference: bool = True
    multi_scale_supervision: bool = True
    drop_path_rate: float = 0.2
    freeze_backbone: bool = False
    task: str = "general"
    loss_weights: dict | None = None

    def __post_init__(self, **kwargs):
        if self.id2label is None:
            self.id2label = {0: "background", 1: "foreground"}
        self.label2id = {label: int(index) for index, label in self.id2label.items()}  # JSON keys are strings
        # Not the entries of the repository that the configuration comes from: a saved folder refers to its own code.
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs["custom_pipelines"] = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Raise a `ValueError` that names the first field with an unknown value or a conflict with another field."""
        for field, allowed in ALLOWED_VALUES.items():
            value = getattr(self, field)
            # Compare types too, since `1 == True` and `3 == 3.0` in Python.
            if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
                raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        self._validate_backbone()
        self._validate_numbers()
        if self.squeeze_block is None and self.context_levels != 0:
            raise ValueError(
                f"squeeze_block=None needs context_levels=0, not context_levels={self.context_levels}: "
                "a squeeze block has to reduce the concatenated context to the deepest map's channels."
            )
        if self.gradient_reference and not self.multi_scale_supervision:
            raise ValueError(
                "gradient_reference=True needs multi_scale_supervision=True: the gradient targets are computed from "
                "the stages' own predictions. Set both to False, or neither."
            )

    def _validate_backbone(self):
        named = {**SWIN_BACKBONES, **DINO_V3_BACKBONES}
        if not isinstance(self.backbone, str) or not self.backbone:
            raise ValueError(f"backbone={self.backbone!r} is not one of {', '.join(named)}, nor a timm model's name.")
        if self.backbone.startswith(("swin_v1_", "dino_v3_")) and self.backbone not in named:
            raise ValueError(f"backbone={self.backbone!r} is not one of {', '.join(named)}.")

    def _validate_numbers(self):
        channels = self.decoder_channels
        if channels is not None and (type(channels) is not int or channels < 1):
            raise ValueError(f"decoder_channels={channels!r} is neither a positive integer nor None.")
        rate = self.drop_path_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate={rate!r} is not a number in [0, 1).")
        if self.loss_weights is None:
            return
        if not isinstance(self.loss_weights, dict):
            raise ValueError(f"loss_weights={self.loss_weights!r} is neither None nor a dict of {LOSS_TERMS}.")
        for term, weight in self.loss_weights.items():
            if term not in LOSS_TERMS:
                raise ValueError(f"loss_weights names {term!r}, which is not one of {', '.join(LOSS_TERMS)}.")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
                raise ValueError(f"loss_weights[{term!r}]={weight!r} is not a number of at least 0.")


BiRefNetConfig.register_for_auto_class()

__all__ = ["BiRefNetConfig"]
