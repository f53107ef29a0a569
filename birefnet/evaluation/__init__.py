"""`birefnet evaluate`: measures of image segmentation and matting, for models and for folders of masks.

`measure` compares one matte with its ground truth. `average` combines the measures of many pictures.
"""

from birefnet.evaluation.metrics import LOWER_IS_BETTER, MEASURES, average, measure


__all__ = ["LOWER_IS_BETTER", "MEASURES", "average", "measure"]
