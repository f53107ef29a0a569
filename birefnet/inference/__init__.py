"""Models ready to run: loading, device, dtype, int8, and the command-line arguments for them.

`load_remover(...)` returns the background-removal pipeline. All commands use it.
"""

from birefnet.inference.arguments import add_model_arguments, model_options
from birefnet.inference.loading import load_model
from birefnet.inference.remover import load_remover


__all__ = ["add_model_arguments", "load_model", "load_remover", "model_options"]
