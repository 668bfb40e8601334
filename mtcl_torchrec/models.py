"""`MTCL` and `MTCLTrain`: the two classes that a TorchRec pipeline needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.balance.weighting import LossWeighting
from mtcl_torchrec.modules.calibration import Calibration
from mtcl_torchrec.modules.embeddings import (
    embedding_dims,
    looked_up_features,
    rows_of_features,
)
from mtcl_torchrec.modules.fusion import FusedLoss
from mtcl_torchrec.modules.gates import EPNet, PPNet
from mtcl_torchrec.modules.guard import SkipFlag
from mtcl_torchrec.modules.lookups import Lookups
from mtcl_torchrec.modules.losses import Logits, MultiTaskLoss
from mtcl_torchrec.modules.output import FusedOutput, item_classes
from mtcl_torchrec.modules.rare import warn_of_uncalibrated
from mtcl_torchrec.modules.regularisers import Regularisers
from mtcl_torchrec.modules.sequences import Sequences
from mtcl_torchrec.modules.sequences.lstm_towers import LSTMTowers
from mtcl_torchrec.modules.towers import MultiTaskTower, Precision
from mtcl_torchrec.schema import Group, Task, check_unique, nearest


class MTCL(nn.Module):
    """Multi-task collaborative learning on top of an embedding-bag collection.

    Embeddings and dense features go through an optional interaction (such as ``LowRankCrossNet``), a shared trunk, a
    tower and a head per task; the predictions are fused into one score that ranks.

    Args:
        embedding_bag_collection: any TorchRec EmbeddingBagCollection, also one on the meta device, or a
            ManagedCollisionEmbeddingBagCollection; None where all tables are in `embedding_collection`, or there are
            dense features alone.
        dense_in_features: D, number of dense features; 0 where there are none.
        trunk: `SharedBottom`, `MMoE`, `PLE`, `AdaTT`, `HoME`, `STEM`, `SingleTask`, or a module of the signature in
            `mtcl_torchrec.modules.trunks`.
        tasks: what is predicted, in the order of the label columns.
        fused_score: `WeightedMean`, or a module of the signature in `mtcl_torchrec.modules.fusion`; without one there
            is no ``"score"``.
        interaction: function of the input width that makes a module (B, width) → (B, width), put before the trunk.
        tower_layers: widths of each task's tower; may be empty.
        embedding_dropout: while training, the share of features whose whole embedding is left out of a row, so that
            the model learns to do without an id it does not know well.
        dense_dropout, dense_noise: while training, dropout of dense features and standard deviation of added noise.
        tower_dropout: after each activation in a tower.
        feature_groups: sparse feature -> its groups; needed where a task is restricted by `Task.inputs` or has a dot
            head (`Task.head`).
        dense_groups: groups of each dense column; likewise.
        precision: ``"bf16"`` computes everything between the embeddings and the heads under autocast, in evaluation
            too; parameters, heads, losses and predictions stay float32.  It needs no GradScaler, and must have none: a
            scaled loss would reach tables whose optimizer is fused into backward.  A CPU without bf16 instructions is
            slower in it.
        epnet, ppnet: PEPNet's gates on the embeddings and on the towers, see `mtcl_torchrec.modules.gates`.
        calibration: of the predictions that it returns and fuses, not of the logits that train; may be set after
            training, too, as ``model.output.calibration``.
        lookups: modules that make more inputs by key, see `mtcl_torchrec.modules.lookups.Lookups`.
        embedding_collection: a TorchRec EmbeddingCollection, or several (of tables of different widths), where
            histories and their candidates are looked up; `lookups` holds a
            `mtcl_torchrec.modules.sequences.Sequences` then.
        lstm_towers: an LSTM for each task beside its representation.
        base_rates: binary task -> how often its event happens among all rows, such as ``{"click": 0.44}``; multiclass
            task -> the share of each class.  The untrained model then predicts about that, where it would begin at even
            odds and learn first that a like is rare.  Runs from a YAML count them.

    Raises:
        ValueError: tasks of one name, a fused score over an unknown task, a restricted task without groups, or base
            rates that do not fit, see `mtcl_torchrec.modules.heads.starting_logits`.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from mtcl_torchrec import MMoE, WeightedMean
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, feature_names=["user", "item"])]
        >>> model = MTCL(
        ...     embedding_bag_collection=EmbeddingBagCollection(tables=tables),
        ...     dense_in_features=2,
        ...     trunk=MMoE(num_experts=4, expert_layers=[16, 8]),
        ...     tasks=[Task.binary("click"), Task.binary("like")],
        ...     fused_score=WeightedMean({"click": 1.0, "like": 5.0}),
        ... )
        >>> ids = KeyedJaggedTensor(["user", "item"], values=torch.arange(6), lengths=torch.ones(6, dtype=torch.int64))
        >>> out = model(torch.randn(3, 2), ids)
        >>> {name: tuple(value.shape) for name, value in out.items()}
        {'click': (3,), 'like': (3,), 'score': (3,)}

        Ids of any size, each with a row of its own while there is room (zero-collision hashing):

        >>> from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
        >>> from torchrec.modules.mc_modules import (
        ...     DistanceLFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule
        ... )
        >>> slots = MCHManagedCollisionModule(
        ...     zch_size=100, device=torch.device("cpu"), eviction_policy=DistanceLFU_EvictionPolicy(),
        ...     eviction_interval=100, input_hash_size=2**40,
        ... )  # and buckets=world_size, where ranks share the table
        >>> managed = ManagedCollisionEmbeddingBagCollection(
        ...     EmbeddingBagCollection(tables=tables), ManagedCollisionCollection({"t": slots}, tables)
        ... )
        >>> model = MTCL(managed, 2, MMoE(num_experts=4, expert_layers=[16, 8]), [Task.binary("click")])
        >>> values, lengths = torch.randint(2**40, (6,)), torch.ones(6, dtype=torch.int64)
        >>> model(torch.randn(3, 2), KeyedJaggedTensor(["user", "item"], values=values, lengths=lengths))["click"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        embedding_bag_collection: nn.Module | None,
        dense_in_features: int,
        trunk: nn.Module,
        tasks: Sequence[Task],
        fused_score: nn.Module | None = None,
        *,
        interaction: Callable[[int], nn.Module] | None = None,
        tower_layers: Sequence[int] = (32,),
        embedding_dropout: float = 0.0,
        dense_dropout: float = 0.0,
        dense_noise: float = 0.0,
        tower_dropout: float = 0.0,
        feature_groups: Mapping[str, Sequence[Group]] | None = None,
        dense_groups: Sequence[Sequence[Group]] | None = None,
        precision: Precision = "fp32",
        epnet: EPNet | None = None,
        ppnet: PPNet | None = None,
        calibration: Calibration | None = None,
        lookups: Sequence[nn.Module] = (),
        embedding_collection: nn.Module | Sequence[nn.Module] | None = None,
        lstm_towers: LSTMTowers | None = None,
        base_rates: Mapping[str, float | Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("a model needs at least one task")
        names = [task.name for task in tasks]
        check_unique("task", names)
        calibrated = {} if calibration is None else calibration.calibrated
        warn_of_uncalibrated([task for task in tasks if task.name not in calibrated])
        for name in getattr(fused_score, "tasks", ()):
            if name not in names:
                raise ValueError(f"the fused score needs task {name!r}, which the model lacks{nearest(name, names)}")
        bags = embedding_bag_collection
        more = Lookups({} if bags is None else embedding_dims(bags), lookups)
        dims = more.dims
        sequences = _sequences(lookups, embedding_collection)
        if not dims and not dense_in_features:
            raise ValueError("the model has no input: neither embeddings nor dense features")
        for key, width in getattr(fused_score, "features", {}).items():
            if dims.get(key) != width:
                raise ValueError(
                    f"the fused score reads a pooled embedding {key!r} of width {width}, and the model has "
                    f"{f'one of width {dims[key]}' if key in dims else f'none{nearest(key, dims)}'}"
                )
        features = set() if bags is None else looked_up_features(bags)
        features |= {name for of in sequences for name in of.candidates}
        self.tasks = tuple(tasks)
        self.embedding_bag_collection = embedding_bag_collection
        self.embedding_collections = _collections(embedding_collection)
        self.lookups = more
        self.tower = MultiTaskTower(
            dims,
            dense_in_features,
            trunk,
            tasks,
            interaction=interaction,
            tower_layers=tower_layers,
            embedding_dropout=embedding_dropout,
            dense_dropout=dense_dropout,
            dense_noise=dense_noise,
            tower_dropout=tower_dropout,
            feature_groups=feature_groups,
            dense_groups=dense_groups,
            precision=precision,
            epnet=epnet,
            ppnet=ppnet,
            lstm_towers=lstm_towers,
            histories={name: of for part in sequences for name, of in part.inputs().items()},
            base_rates=base_rates,
        )
        self.output = FusedOutput(tasks, fused_score, item_classes(tasks, features, fused_score), dims, calibration)

    def forward(
        self,
        dense_features: torch.Tensor,
        sparse_features: KeyedJaggedTensor,
        request: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Predictions and the fused score of B rows.

        Args:
            dense_features: (B, D) float.
            sparse_features: KeyedJaggedTensor of B rows.
            request: (B,) int64, for a fused score that compares the candidates of a request with each other; rows of
                equal numbers are of one request.  None: all rows are.

        Returns:
            task name -> (B,) probability or value, (B, num_classes) probabilities for a multiclass task; and
            ``"score"`` (B,) in [0, 1].  For ``buy`` after ``click`` it is the probability of both, and ``"buy|click"``,
            where there is one, that of ``buy`` given ``click`` (see `mtcl_torchrec.modules.chains`).
        """
        pooled = dense_features[:, :0]
        if self.embedding_bag_collection is not None:
            pooled = self.embedding_bag_collection(sparse_features)
        sequences = [collection(sparse_features) for collection in self.embedding_collections]
        pooled = self.lookups(pooled, sparse_features, sequences)
        logits = self.tower(dense_features, pooled)
        return self.output(logits, dense_features, sparse_features, pooled, request)


def _collections(given: nn.Module | Sequence[nn.Module] | None) -> nn.ModuleList:
    if given is None:
        return nn.ModuleList()
    return nn.ModuleList([given] if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList) else given)


def _sequences(lookups: Sequence[nn.Module], collections: nn.Module | Sequence[nn.Module] | None) -> list[Sequences]:
    found = [module for module in lookups if isinstance(module, Sequences)]
    if bool(found) != bool(len(_collections(collections))):
        raise ValueError(
            "histories need both: embedding_collection=..., in which they are looked up, and a Sequences among lookups"
        )
    return found


def _collections_of(model: MTCL) -> list[nn.Module]:
    """Whatever looks a sparse feature up in a table."""
    several = [model.embedding_bag_collection, *getattr(model, "embedding_collections", ())]
    return [collection for collection in several if collection is not None]


def _check_type(argument: str, value: object, wanted: type, such_as: str) -> None:
    if value is not None and not isinstance(value, wanted):
        raise TypeError(f"{argument} is a {wanted.__name__}, such as {such_as}, not {value!r}")


class MTCLTrain(nn.Module):
    """`MTCL` with its loss, in the form TorchRec's train pipelines call:
    ``forward(batch) -> (loss, (loss, logits, labels))``.

    A batch whose loss is not finite on some rank trains no table on any rank: the gradient of the embeddings is zero
    then.  (Adam fused into backward, on CUDA, still moves that batch's rows by the momentum they have.)  For the dense
    optimizer, make it ``fused=True`` and say ``optimizer.found_inf = train.loss.found_inf`` once the model is on its
    device; it then leaves the same steps out.  ``train.loss.skipped()`` tells how many there were.

    ``train.loss.freeze("like")`` stops a task from moving what the tasks share, see
    `mtcl_torchrec.modules.freezing.FrozenTasks`.

    Args:
        model: the model.
        loss_weighting: weights that follow the losses, such as `mtcl_torchrec.modules.balance.weighting.FAMO`; None is
            the weighted sum.  Its parameters, where it has some, belong into the dense optimizer, without weight decay.
        gradient_surgery: combines the tasks' gradients of what they share; None leaves them to add up.
        regularisers: penalties by name, such as ``{"l2_embedding": 1e-4}``; see
            `mtcl_torchrec.modules.regularisers.Regularisers`.
        fused_loss: trains the fused score too, such as ``FusedLoss({"click": 1, "like": 8})``.
        seed: of the draws of `Task.negative_rate`.
        process_group: the ranks that share a global batch; None is the default group.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec.datasets.utils import Batch
        >>> from mtcl_torchrec import SharedBottom
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, feature_names=["user"])]
        >>> ebc = EmbeddingBagCollection(tables=tables)
        >>> train = MTCLTrain(MTCL(ebc, 0, SharedBottom([8]), [Task.binary("click"), Task.regression("seconds")]))
        >>> users = KeyedJaggedTensor(["user"], values=torch.arange(3), lengths=torch.ones(3, dtype=torch.int64))
        >>> labels = torch.tensor([[1.0, 12.5], [0.0, float("nan")], [1.0, 3.0]])  # NaN: not known, trains nothing
        >>> loss, (_, logits, _) = train(Batch(torch.empty(3, 0), users, labels))
        >>> loss.shape, logits["click"].shape
        (torch.Size([]), torch.Size([3]))
    """

    def __init__(
        self,
        model: MTCL,
        *,
        loss_weighting: LossWeighting | None = None,
        gradient_surgery: GradientSurgery | None = None,
        regularisers: Mapping[str, float | Mapping[str, float]] | None = None,
        fused_loss: FusedLoss | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_type("loss_weighting", loss_weighting, LossWeighting, "FAMO(len(model.tasks))")
        _check_type("gradient_surgery", gradient_surgery, GradientSurgery, 'GradientSurgery("upgrad")')
        self.model = model
        if fused_loss is not None:
            fused_loss.build(model.tasks, model.output.fused_score)
        self.surgery = gradient_surgery
        if gradient_surgery is not None:
            gradient_surgery.build(model)
        self.skip_flag = SkipFlag()
        rows = rows_of_features(*_collections_of(model))
        self.loss = MultiTaskLoss(
            model.tasks,
            weighting=loss_weighting,
            regularisers=Regularisers(regularisers, model.tower, model.lookups, rows, process_group),
            fused_loss=fused_loss,
            seed=seed,
            item_rows=rows,
            process_group=process_group,
        )

    def forward(self, batch: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, Logits, torch.Tensor]]:
        """The loss of a batch.

        Args:
            batch: TorchRec's ``Batch`` or an `MTBatch`.

        Returns:
            ``(loss, (loss, logits, labels))``; the second part is detached, logits by task name.
        """
        pooled = batch.dense_features[:, :0]
        if self.model.embedding_bag_collection is not None:
            pooled = self.model.embedding_bag_collection(batch.sparse_features)
        sequences = [collection(batch.sparse_features) for collection in self.model.embedding_collections]
        skip = self.skip_flag(batch.labels)
        pooled = self.model.lookups(pooled, batch.sparse_features, sequences, skip)
        frozen = self.loss.frozen_tasks(batch.labels)
        cut = None if self.surgery is None else self.surgery(batch.sparse_features)
        logits = self.model.tower(batch.dense_features, pooled, skip, frozen, cut)
        if self.loss.fused_loss is None:
            return self.loss(logits, pooled, batch, skip, cut)
        detached = self.loss.fused_loss.detached
        out = self.model.output(logits, batch.dense_features, batch.sparse_features, pooled, None, detached)
        return self.loss(logits, pooled, batch, skip, cut, out["score"])
