"""Checkpoints: the table of published variants, downloading, loading, converting and publishing them.

`load_variant("portrait")` gives a model and its processor; `load_source` does so for files and folders as well.
"""

from birefnet.hub.load import load_source, load_variant
from birefnet.hub.variants import KINDS, VARIANTS, Variant, choose_variant, get_variant


__all__ = ["KINDS", "VARIANTS", "Variant", "choose_variant", "get_variant", "load_source", "load_variant"]
