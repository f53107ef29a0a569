"""Registers the model with transformers' Auto classes."""


def register_model() -> None:
    """
    Registers the configuration, the image processor and the model of this repository with the Auto classes.

    The tools in `birefnet` then reach the model as a user does, without running the code of a repository that they
    only know by name.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageSegmentation,
        AutoModelForSemanticSegmentation,
    )

    from birefnet.repository.configuration_birefnet import BiRefNetConfig
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

    AutoConfig.register(BiRefNetConfig.model_type, BiRefNetConfig, exist_ok=True)
    AutoImageProcessor.register(
        BiRefNetConfig,
        image_processor_classes={"pil": BiRefNetImageProcessor, "torchvision": BiRefNetImageProcessor},
        exist_ok=True,
    )
    for auto_class in (AutoModel, AutoModelForImageSegmentation, AutoModelForSemanticSegmentation):
        auto_class.register(BiRefNetConfig, BiRefNetForImageSegmentation, exist_ok=True)
