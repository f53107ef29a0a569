"""`birefnet evaluate`: the measures of the field, for models and for folders of masks.

`measure` compares one matte with its ground truth; `average` joins the measures of many.
"""

from birefnet.evaluation.metrics import LOWER_IS_BETTER, MEASURES, average, measure


__all__ = ["LOWER_IS_BETTER", "MEASURES", "average", "measure"]
