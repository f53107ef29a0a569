"""Keeps the import path of version 0.1. The code is in `birefnet.hub`."""

from birefnet.hub.load import load_variant
from birefnet.hub.variants import VARIANTS, Variant, choose_variant, get_variant


__all__ = ["VARIANTS", "Variant", "choose_variant", "get_variant", "load_variant"]
