"""Tools around the BiRefNet model: command line, training, evaluation, variants, conversion, publishing."""

from importlib.util import find_spec
from pathlib import Path


__version__ = "0.1.0"


def repository_folder() -> Path:
    """Returns the folder of the Hub repository (code, configuration, embedded weights), for `from_pretrained`."""
    return Path(find_spec("birefnet.repository").origin).parent


def compile(model):
    """
    Make a model on a CUDA GPU replay its work as a CUDA graph, without the time that Python needs between kernels.

    The first call with each shape of `pixel_values` captures a graph, which takes about four forward passes. Later
    calls with that shape replay it. The results are those of the model without graphs. Calls with gradients, with
    `labels` or with other options run without a graph, and so does training. After `model.to(...)` or `model.half()`,
    new graphs are captured. The graphs of the last eight shapes are kept.

    On a CPU the model stays as it is, and a warning says so.

    Args:
        model (`BiRefNetForImageSegmentation`): Model in evaluation mode, on its device.

    Returns:
        The same model.

    Raises:
        ValueError: The model is in training mode.

    Example:

    ```python
    >>> model = birefnet.compile(model.half().to("cuda"))
    ```
    """
    from birefnet.inference.compilation import compile_model

    return compile_model(model)
