"""Fitting on held-out predictions what the model does with them: the weights of the fused score.

`held_out_of` makes the predictions of a finished run, `fit_fusion` fits, ``fitted.fused_score`` goes into a model or,
with `mtcl_torchrec.training.fitted_fusion.save_fusion`, into the run; ``mtcl fuse`` does all of it.
"""

from mtcl_torchrec.fusing.combiners import Combiner
from mtcl_torchrec.fusing.fit import fit_fusion
from mtcl_torchrec.fusing.fitted import FittedFusion
from mtcl_torchrec.fusing.held_out import HeldOut

__all__ = ["Combiner", "FittedFusion", "HeldOut", "fit_fusion"]
