"""Published checkpoints: the table of variants, and how to download, load, convert and publish them.

`load_variant("portrait")` returns a model and its processor. `load_source` does the same for files and folders.
"""

from birefnet.hub.load import load_source, load_variant
from birefnet.hub.variants import KINDS, VARIANTS, Variant, choose_variant, get_variant


__all__ = ["KINDS", "VARIANTS", "Variant", "choose_variant", "get_variant", "load_source", "load_variant"]
