"""Everything that is fitted on held-out predictions: calibration, and the weights of the fused score.

`mtcl_torchrec.training.held_out.held_out_of` makes the predictions of a finished run, `fit_fusion` fits,
``fitted.fused_score`` goes into a model or, with `mtcl_torchrec.training.fitted_fusion.save_fusion`, into the run;
``mtcl fuse`` does all of it.
"""

from mtcl_torchrec.fusing.combiners import Combiner
from mtcl_torchrec.fusing.fit import fit_fusion
from mtcl_torchrec.fusing.fitted import FittedFusion
from mtcl_torchrec.fusing.held_out import HeldOut

__all__ = ["Combiner", "FittedFusion", "HeldOut", "fit_fusion"]
