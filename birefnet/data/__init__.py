"""Pairs of photo and mask for training and evaluation.

`read_pairs` lists the pairs of folders, parquet files and Hub data sets. `decode_pair` reads one pair. The module
`drawn_scenes` draws new pairs (`birefnet draw`).
"""

from birefnet.data.pairs import BadPairError, Pair, decode_mask, decode_pair, read_pairs


__all__ = ["BadPairError", "Pair", "decode_mask", "decode_pair", "read_pairs"]
