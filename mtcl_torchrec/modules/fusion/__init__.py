"""From the tasks' predictions to one score in [0, 1].

A fused score of your own is any `nn.Module` with ``forward(parts)``, parts a dict of task name -> (B,) in [0, 1], that
returns (B,) in [0, 1], and an attribute ``tasks``, the names it needs.  With the attribute ``needs_context = True`` it
is called as ``forward(parts, context)``, see `RowContext`.
"""

from mtcl_torchrec.modules.fusion.contract import RowContext, fuse
from mtcl_torchrec.modules.fusion.means import WeightedMean

__all__ = ["RowContext", "WeightedMean", "fuse"]
