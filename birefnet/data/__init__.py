"""Photos with masks for training and evaluation: reading pairs, and drawing new ones (`birefnet draw`).

`read_pairs` lists the pairs of folders, parquet files and Hub data sets; `decode_pair` opens one.
"""

from birefnet.data.pairs import BadPairError, Pair, decode_mask, decode_pair, read_pairs


__all__ = ["BadPairError", "Pair", "decode_mask", "decode_pair", "read_pairs"]
