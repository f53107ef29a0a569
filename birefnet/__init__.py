"""Everything around the BiRefNet model: command line, training, evaluation, variants, conversion, publishing."""

from importlib.util import find_spec
from pathlib import Path


__version__ = "0.1.0"


def repository_folder() -> Path:
    """The folder of the Hub repository: code, configuration and embedded weights, as `from_pretrained` takes it."""
    return Path(find_spec("birefnet.repository").origin).parent
