"""Inputs by key that come from elsewhere than an embedding-bag collection, and join what it has pooled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import JaggedTensor

from mtcl_torchrec.modules.embeddings import Pooled, pooled_by_key
from mtcl_torchrec.modules.guard import stop_gradient_if


class Lookups(nn.ModuleList):
    """Modules that make more inputs by key, run between the tables and the tower as one leaf of TorchRec's tracer.

    Each is called as ``module(sparse_features, sequence_embeddings)``, the latter a dict: feature -> JaggedTensor, or
    None where the model has no embedding collection.  It returns a dict: key -> (B, width), and has an attribute
    ``dims``, a dict: key -> width; what it returns beyond those keys stands there for whoever asks.  Their keys stand
    beside those of the pooled embeddings everywhere: in the trunk's input, at the cut of gradient surgery, in the gates
    of PEPNet, before a fused score that reads inputs.

    Attributes that a module may have:

    - ``features``: names of the sparse features that it reads (serving needs them);
    - ``takes``: names of pooled embeddings.  It is called with those as a third argument, a dict: key -> (B, width),
      and they stand nowhere else; it may give one back under the same key;
    - ``penalised``: False where ``l2_embedding`` is not to look at what it makes.

    Args:
        table_dims: key of each pooled embedding -> its width.
        modules: see above.

    Raises:
        ValueError: a key is made twice, or a module takes what is not there.

    Attributes:
        dims: key -> width of all inputs, in the order in which the tower reads them.

    Example:
        >>> class Length(nn.Module):
        ...     dims = {"length": 1}
        ...     def forward(self, sparse_features, sequence_embeddings=None):
        ...         return {"length": sparse_features["tags"].lengths().float().unsqueeze(1)}
        >>> lookups = Lookups({"user": 4}, [Length()])
        >>> lookups.dims
        {'user': 4, 'length': 1}
    """

    def __init__(self, table_dims: Mapping[str, int], modules: Iterable[nn.Module] = ()) -> None:
        super().__init__(modules)
        self.table_dims = dict(table_dims)
        self.dims: dict[str, int] = dict(table_dims)
        for module in self:
            for key in _takes(module):
                if self.dims.pop(key, None) is None:
                    raise ValueError(f"{type(module).__name__} takes {key!r}, which no table gives")
            made: Any = module.dims
            for key, width in made.items():
                if key in self.dims:
                    raise ValueError(f"{type(module).__name__} makes {key!r}, which is there already")
                self.dims[key] = width

    @property
    def penalised(self) -> tuple[str, ...]:
        """The keys whose embeddings ``l2_embedding`` pulls at."""
        free = {key for module in self if not getattr(module, "penalised", True) for key in _dims(module)}
        return tuple(key for key in self.dims if key not in free)

    def forward(
        self,
        pooled: Pooled,
        sparse_features: Any,
        sequence_embeddings: Sequence[Any] = (),
        skip: torch.Tensor | None = None,
    ) -> Pooled:
        """All inputs by key; `pooled` as it is where there are no modules.

        Args:
            pooled: what the embedding-bag collection returned; (B, 0) where the model has none.
            sparse_features: the batch's KeyedJaggedTensor.
            sequence_embeddings: what each embedding collection returned.
            skip: () bool: the gradient of sequence embeddings is exactly zero where this is True by the time of the
                backward pass, whatever an encoder makes of a gradient of zero.
        """
        if not len(self):
            return pooled
        inputs = pooled_by_key(pooled, self.table_dims) if self.table_dims else {}
        of_positions = _guarded(sequence_embeddings, skip) if sequence_embeddings else None
        for module in self:
            taken = {key: inputs.pop(key) for key in _takes(module)}
            given = (taken,) if taken else ()
            inputs |= module(sparse_features, of_positions, *given)
        return inputs


def _guarded(sequence_embeddings: Sequence[Any], skip: torch.Tensor | None) -> dict[str, JaggedTensor]:
    """Feature -> its embeddings, of all collections."""
    found: dict[str, JaggedTensor] = {}
    for given in sequence_embeddings:
        found |= given.wait() if isinstance(given, Awaitable) else given
    if skip is None:
        return found
    return {
        name: JaggedTensor(stop_gradient_if(of.values(), skip), lengths=of.lengths(), offsets=of.offsets())
        for name, of in found.items()
    }


def _takes(module: nn.Module) -> Sequence[str]:
    takes: Any = getattr(module, "takes", ())
    return takes


def _dims(module: nn.Module) -> Mapping[str, int]:
    dims: Any = module.dims
    return dims
