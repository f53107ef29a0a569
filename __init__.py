"""
The files of the Hub repository as a Python package, `birefnet.repository`.

Importing it registers the model with transformers' Auto classes: the tools in `birefnet/` then reach it as a user
does, and yet never run the code of a repository that they were only given the name of.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
)

from .configuration_birefnet import BiRefNetConfig
from .image_processing_birefnet import BiRefNetImageProcessor
from .modeling_birefnet import BiRefNetForImageSegmentation


AutoConfig.register(BiRefNetConfig.model_type, BiRefNetConfig, exist_ok=True)
AutoImageProcessor.register(
    BiRefNetConfig,
    image_processor_classes={"pil": BiRefNetImageProcessor, "torchvision": BiRefNetImageProcessor},
    exist_ok=True,
)
for auto_class in (AutoModel, AutoModelForImageSegmentation, AutoModelForSemanticSegmentation):
    auto_class.register(BiRefNetConfig, BiRefNetForImageSegmentation, exist_ok=True)
