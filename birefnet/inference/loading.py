"""One way from whatever names a model to the model and its processor."""

import atexit
import gc
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def collector_at_rest():
    """
    Keeps Python's garbage collector off while the libraries are imported, and the objects they leave out of its sight.

    torch, transformers and timm make more than half a million objects that live as long as the process. As they appear
    the collector looks through all of them time and again, and finds next to nothing: a fifth of the start-up. Where
    torch is imported already, the others are too, and the collector goes on as it was.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # else the first pass afterwards would look through all of them after all
        atexit.register(gc.unfreeze)  # the interpreter frees them when it ends, as ever
        gc.enable()


def load_model(source, dtype="float32", **fields):
    """
    Loads a trained model in evaluation mode and its image processor.

    Args:
        source (`str` or `Path`): A folder or Hub repository in this project's form, or anything else that
            `birefnet convert` reads: an official repository, the name of a variant, a file of weights.
        dtype (`str`, *optional*, defaults to `"float32"`): The weights' type.
        fields: Fields of the configuration to change, none of which shapes the network.

    Returns:
        `tuple`: the `BiRefNetForImageSegmentation` and its `BiRefNetImageProcessor`.

    Raises:
        OSError, ValueError, CommandError: if the source cannot be found or read.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageSegmentation

    import birefnet.repository  # noqa: F401  registers the model with the Auto classes
    from birefnet.hub.checkpoints import model_from_state_dict
    from birefnet.hub.load import load_source

    if is_own(source):
        model = AutoModelForImageSegmentation.from_pretrained(str(source), dtype=dtype, **fields)
        return model.eval(), AutoImageProcessor.from_pretrained(str(source))
    model, processor, _ = load_source(str(source), dtype=dtype)
    if fields:
        config = AutoConfig.for_model(**{**model.config.to_dict(), **fields})
        model = model_from_state_dict(config, model.state_dict(), model.dtype)
    return model.eval(), processor


def is_own(source):
    """Whether a folder or Hub repository is in this project's form: its `config.json` says so."""
    from transformers import PreTrainedConfig

    if Path(source).is_file():
        return False
    try:
        return PreTrainedConfig.get_config_dict(str(source))[0].get("model_type") == "birefnet"
    except OSError:
        return False
