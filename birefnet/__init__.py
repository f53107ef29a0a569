"""Tools around the BiRefNet model: command line, training, evaluation, variants, conversion, publishing."""

from importlib.util import find_spec
from pathlib import Path


__version__ = "0.1.0"


def repository_folder() -> Path:
    """Returns the folder of the Hub repository (code, configuration, embedded weights), for `from_pretrained`."""
    return Path(find_spec("birefnet.repository").origin).parent
