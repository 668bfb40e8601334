"""The shared part of a multi-task model: which task sees which expert.

All trunks here are one masked graph of experts (`graph`): a level has experts, each reading one stream, and gates, each
mixing the experts that it sees.  SharedBottom, SingleTask and MMoE are one level with different masks; PLE, AdaTT, HoME
and STEM have several, residuals, or gradients that stop at what is another task's.

A trunk of your own is any `nn.Module` with

- ``forward(x, tasks)``: x (B, D), tasks a sequence of n task numbers → (B, n, H), the representation of each,
- ``out_features``: H,
- optionally ``build(in_features, num_tasks)`` or ``build(in_features, num_tasks, inputs)``, called once before
  training, for what depends on those numbers, or, see `TrunkInputs`, on what the tasks and columns are,
- optionally ``shared(x, tasks)`` and ``split(shared, tasks)``, which do in two steps what ``forward`` does in one, see
  `Trunk`: gradients of several tasks can then be balanced where the tasks part,
- optionally ``shared_parameters()``, see `shared_parameters`; without it, all parameters count as shared.

In Python, pass it as ``MTCL(trunk=...)``.  In YAML, name it by its import path, ``trunk: {kind: my_package.my_module:
MyTrunk, options: {...}}``; options are the arguments of its constructor.
"""

from mtcl_torchrec.modules.trunks.contract import (
    Shared,
    Trunk,
    TrunkInputs,
    check_representations,
    prepare_trunk,
    shared_parameters,
)
from mtcl_torchrec.modules.trunks.graph import ExpertGraph, ExpertLevel, LevelMask, Mix
from mtcl_torchrec.modules.trunks.home import HoME
from mtcl_torchrec.modules.trunks.mixtures import PLE, AdaTT, MMoE, SharedBottom, SingleTask
from mtcl_torchrec.modules.trunks.stem import STEM

__all__ = [
    "PLE",
    "STEM",
    "AdaTT",
    "ExpertGraph",
    "ExpertLevel",
    "HoME",
    "LevelMask",
    "MMoE",
    "Mix",
    "Shared",
    "SharedBottom",
    "SingleTask",
    "Trunk",
    "TrunkInputs",
    "check_representations",
    "prepare_trunk",
    "shared_parameters",
]
