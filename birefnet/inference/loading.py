"""Loads a model and its processor from a folder, a file, a variant's name or a Hub repository."""

import atexit
import gc
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def garbage_collection_paused():
    """
    Context manager that pauses Python's garbage collection during imports. Saves a fifth of the start-up time.

    torch, transformers and timm create more than half a million objects that live as long as the process. The garbage
    collector would scan them many times and free almost nothing. Afterwards, the collector ignores them. If torch is
    already imported, nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # otherwise, the next collection would scan all these objects
        atexit.register(gc.unfreeze)  # lets the interpreter free them at exit, as usual
        gc.enable()


def load_model(source, dtype="float32", **fields):
    """
    Loads a trained model in evaluation mode, and its image processor.

    Args:
        source (`str` or `Path`): A folder or Hub repository of this project, or any other source that
            `birefnet convert` reads: an official repository, a variant's name, a weights file.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the weights.
        fields: Fields of the configuration to change. They must not change the shape of the network.

    Returns:
        `tuple`: The `BiRefNetForImageSegmentation` and its `BiRefNetImageProcessor`.

    Raises:
        OSError, ValueError, CommandError: The source does not exist or cannot be read.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageSegmentation

    from birefnet.hub.checkpoints import model_from_state_dict
    from birefnet.hub.load import load_source
    from birefnet.inference.registration import register_model

    register_model()
    if is_own(source):
        model = AutoModelForImageSegmentation.from_pretrained(str(source), dtype=dtype, **fields)
        return model.eval(), AutoImageProcessor.from_pretrained(str(source))
    model, processor, _ = load_source(str(source), dtype=dtype)
    if fields:
        config = AutoConfig.for_model(**{**model.config.to_dict(), **fields})
        model = model_from_state_dict(config, model.state_dict(), model.dtype)
    return model.eval(), processor


def is_own(source):
    """Whether a folder or Hub repository belongs to this project, according to its `config.json`."""
    from transformers import PreTrainedConfig

    if Path(source).is_file():
        return False
    try:
        return PreTrainedConfig.get_config_dict(str(source))[0].get("model_type") == "birefnet"
    except OSError:
        return False
