"""Gradient surgery: the tasks' gradients of what they share become one, in one backward pass.

    train = MTCLTrain(model, gradient_surgery=GradientSurgery("upgrad", cut="trunk"))

Nothing else changes: any TorchRec pipeline, tables whose optimizer is fused into backward, any number of ranks.

What a task's gradient is: what arrives through its own tower, with its weight in the loss.  (In a chain of events that
is also what later tasks say about it.)  Towers, heads and gates of a task's own always get the plain gradient, and
penalties go past it all.  Which shared parameters get which weighted sum is decided by the cut, see `GradientSurgery`.

"Not conflicting" is a statement about the tensors at the cut: to first order, moving *them* against the combined
gradient hurts no task.  Parameters below may still conflict.  The weighted sum of the losses is the default of this
package, since surgery seldom moves AUC by much; MGDA and other methods that give small gradients large weights can
collapse a run, hence the clamps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.balance.cut import CUTS, Columns, Cut, CutAt, Plan, can_split
from mtcl_torchrec.modules.balance.solvers import MOST_TASKS, CAGrad, FromGramian, Measure, NashMTL, Solver, UPGrad
from mtcl_torchrec.modules.balance.solvers import torchjd as of_torchjd
from mtcl_torchrec.modules.balance.solvers_norms import DBMTL, GradNorm
from mtcl_torchrec.modules.balance.solvers_projection import GradVac, PCGrad
from mtcl_torchrec.modules.balance.surgery_statistics import Counts, SurgeryStatistics
from mtcl_torchrec.modules.balance.tables import TableLookups, dense_parameters, table_lookups
from mtcl_torchrec.modules.gates import PPNet
from mtcl_torchrec.schema import ConfigError, check_unique, nearest

KINDS = (
    "measure", "upgrad", "mgda", "imtl_g", "aligned_mtl", "fairgrad", "pcgrad", "gradvac", "cagrad", "nash_mtl",
    "gradnorm", "db_mtl",
)  # fmt: skip


# Their weights grow without bound for a task whose gradient vanishes.
LEAN_ON_SMALL = ("mgda", "imtl_g", "aligned_mtl", "nash_mtl", "db_mtl")


def build_solver(kind: str, num_tasks: int, *, seed: int = 0, **options: float) -> Solver:
    """The solver of that name.

    ``mgda`` (Désidéri 2012; Sener and Koltun, NeurIPS 2018, algorithm 2), ``imtl_g`` (Liu et al., ICLR 2021, eq. 6),
    ``aligned_mtl`` (Senushkin et al., CVPR 2023, algorithm 1) and ``fairgrad`` (Ban and Ji, ICML 2024, eq. 4) are
    TorchJD's and wait for the device, as does ``upgrad`` for more than 10 tasks; the others are ours and do not.

    Args:
        kind: one of `KINDS`.
        num_tasks: T.
        seed: of the random orders of ``pcgrad`` and ``gradvac``.
        options: of the solver: ``c`` of cagrad; ``alpha`` of fairgrad (1 where it is left out) and gradnorm; ``lr`` of
            gradnorm; ``beta`` of gradvac and db_mtl.

    Raises:
        ConfigError: no such kind; TorchJD is not installed; too many tasks.

    Example:
        >>> build_solver("cagrad", 3, c=0.5).c
        0.5
    """
    torchjds = {"mgda": "MGDAWeighting", "imtl_g": "IMTLGWeighting", "aligned_mtl": "AlignedMTLWeighting",
                "fairgrad": "FairGradWeighting"}  # fmt: skip
    if kind == "fairgrad":
        options.setdefault("alpha", 1.0)
    if kind in torchjds:
        return FromGramian(of_torchjd(torchjds[kind], **options))
    if kind == "upgrad" and num_tasks > MOST_TASKS:
        return FromGramian(of_torchjd("UPGradWeighting", pref_vector=torch.ones(num_tasks)), mean_one=False)
    if kind in ("pcgrad", "gradvac"):
        return (PCGrad if kind == "pcgrad" else GradVac)(num_tasks, seed=seed, **options)
    ours: dict[str, Any] = {"upgrad": UPGrad, "cagrad": CAGrad, "gradnorm": GradNorm, "db_mtl": DBMTL}
    if kind in ours:
        return ours[kind](num_tasks, **options)
    if kind in ("measure", "nash_mtl"):
        return Measure() if kind == "measure" else NashMTL()
    raise ConfigError(f"no gradient surgery {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")


class GradientSurgery(nn.Module):
    """Combines the tasks' gradients of what they share by weights that follow from their Gramian.

    For g₁ … g_T, the tasks' gradients at the cut for the global batch, G = (⟨gᵢ, gⱼ⟩) is all-reduced in float64 on a
    process group of its own, so every rank finds the same weights w = solver(G).

    ======================  ==========================================  ==============================================
    cut                     G is of                                     what gets which sum
    ======================  ==========================================  ==============================================
    ``"trunk"``             the tensors just before the tasks part      trunk, interaction and tables: Σ wᵢ gᵢ
                            (`Shared`)
    ``"embeddings"``        the pooled embeddings (of each group)       tables: Σ wᵢ gᵢ with their group's w; trunk and
                                                                        interaction: the plain sum
    ``"both"``              both, one Gramian each                      tables: as "embeddings"; trunk and interaction:
                                                                        as "trunk"
    ``"tables"``            the tables' rows and the trunk's and        all of these: Σ wᵢ gᵢ
                            interaction's parameters
    ======================  ==========================================  ==============================================

    "Trunk" means what lies below the place where the tasks part, a task's own experts included; gates of MMoE's kind
    lie above it and are a task's own.  At ``"trunk"``, tasks that see other inputs (`Task.inputs`) have other tensors,
    between which there is no conflict; the other cuts see it.  So have tasks with a dot head, which read the input past
    the trunk and part there.  G is exact on any number of ranks for every cut: rows of
    a batch lie on one rank, rows of a table and dense gradients are added up over the ranks before the products.

    Cost beyond the solver: ``"trunk"`` reads the gradients twice.  ``"embeddings"`` and ``"both"`` take T backward
    passes through the trunk without its parameters, ``"tables"`` T with them, makes ids unique (waiting for the device)
    and sends T gradients of each row and dense parameter over the wire.

    A task without a gradient (no labels in this batch, frozen, weight 0) is left out and has weight 1.  Penalties go on
    beside the weighted sum, as they are.
    Weights are clamped; where they cannot be told (a Gramian that is zero or not finite, a solver without solution) all
    are 1, and the step is counted.  All state is in buffers.

    Args:
        weighting: one of `KINDS`, a `Solver`, or a module from a (n, n) Gramian to (n,) weights, such as TorchJD's.
        cut: where.
        groups: features whose tables get weights of their own, at "embeddings" or "both"; the features in no group form
            one more.
        min_weight, max_weight: clamps, applied after methods without a scale were scaled to a mean weight of 1.
        decay: of the moving averages in the statistics.
        seed: of random orders.
        options: of the solver, see `build_solver`.
        process_group: the ranks that share a global batch; None is the default group.

    Raises:
        ConfigError: no such kind or cut, TorchJD is missing.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec.datasets.utils import Batch
        >>> from mtcl_torchrec import MTCL, MMoE, MTCLTrain, Task
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
        >>> tasks = [Task.binary("click"), Task.binary("like")]
        >>> model = MTCL(EmbeddingBagCollection(tables=tables), 0, MMoE(2, [8]), tasks)
        >>> train = MTCLTrain(model, gradient_surgery=GradientSurgery("upgrad"))
        >>> users = KeyedJaggedTensor(["user"], values=torch.arange(3), lengths=torch.ones(3, dtype=torch.int64))
        >>> loss, _ = train(Batch(torch.empty(3, 0), users, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])))
        >>> loss.backward()
        >>> statistics = train.surgery.statistics()
        >>> statistics.steps, statistics.parts[0].name, min(statistics.parts[0].weights) >= 1
        (1, 'trunk', True)
    """

    newest_weights: torch.Tensor

    def __init__(
        self,
        weighting: str | nn.Module = "upgrad",
        *,
        cut: CutAt = "trunk",
        groups: Sequence[Sequence[str]] = (),
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        decay: float = 0.99,
        seed: int = 0,
        options: dict[str, float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if cut not in CUTS:
            raise ConfigError(f"no cut {cut!r}{nearest(cut, CUTS)}; there are {', '.join(CUTS)}")
        if groups and cut not in ("embeddings", "both"):
            raise ConfigError(f"groups of features have weights of their own at 'embeddings' or 'both', not at {cut!r}")
        if not 0 <= min_weight <= 1 <= max_weight:
            raise ConfigError(f"weights are clamped around 1: 0 ≤ {min_weight=} ≤ 1 ≤ {max_weight=}")
        if isinstance(weighting, str) and weighting not in KINDS:
            raise ConfigError(f"no gradient surgery {weighting!r}{nearest(weighting, KINDS)}")
        self.cut, self.groups = cut, [list(group) for group in groups]
        self.min_weight, self.max_weight, self.decay, self.seed = min_weight, max_weight, decay, seed
        self.process_group = process_group
        self._weighting, self._options = weighting, dict(options or {})
        self._plan: Plan | None = None
        self._own_group: tuple[Any, dist.ProcessGroup] | None = None

    def build(self, model: Any) -> None:
        """Fit it to an `MTCL`; `MTCLTrain` calls this.

        Raises:
            ConfigError: the trunk or the features do not allow this cut, or there is but one task.
        """
        if self._plan is not None:
            raise ConfigError("this gradient surgery is part of a model already; make one for each model")
        names, trunk, collection = [t.name for t in model.tasks], model.tower.trunk, model.embedding_bag_collection
        if len(names) < 2:
            raise ConfigError(f"gradient surgery needs two tasks at least, and there is only {names[0]!r}")
        inner = trunk.trunk if isinstance(trunk, PPNet) else trunk
        if self.cut in ("trunk", "both") and not can_split(inner):
            raise ConfigError(
                f"{type(inner).__name__} does not say what its tasks share (shared and split, see "
                f"mtcl_torchrec.modules.trunks), so gradient surgery cannot cut at {self.cut!r}; take 'embeddings'"
            )
        if model.tower.lstm_towers is not None:
            raise ConfigError(
                "gradient surgery does not see what LSTM towers do to the embeddings, which they read themselves, past "
                "every cut; take a history encoder (model.sequences) with ordinary towers"
            )
        if self.cut == "tables" and len(model.embedding_collections):
            raise ConfigError(
                "gradient surgery at 'tables' needs each row's gradient, and that of a history's rows goes through its "
                "encoder; cut at 'embeddings', 'trunk' or 'both', which take the encoder's output and the candidate"
            )
        dims = model.lookups.dims
        taken = next((key for module in model.lookups for key in getattr(module, "takes", ())), None)
        if self.cut == "tables" and taken is not None:
            raise ConfigError(
                f"gradient surgery at 'tables' sees embeddings that are read as they are pooled, and {taken!r} is "
                "made into something else before; take 'embeddings', 'trunk' or 'both'"
            )
        grouped = self._grouped(dims)
        self._plan = Plan(
            at=self.cut,
            keys=tuple(dims),
            num_tasks=len(names),
            groups=tuple(_columns(group, dims) for group in grouped),
            lookups=table_lookups(collection, dims) if self.cut == "tables" else TableLookups({}, False),
            parameters=tuple(dense_parameters(trunk, model.tower.interaction, model.lookups))
            if self.cut == "tables"
            else (),
        )
        parts = {"trunk": ["trunk"], "tables": ["tables"], "embeddings": [], "both": ["trunk"]}[self.cut]
        if self.cut in ("embeddings", "both"):
            rest = dict.fromkeys(key.split("@")[0] for key in grouped[-1])
            names_of = [*self.groups, *([rest] if len(grouped) > len(self.groups) else [])]
            parts += [", ".join(features) for features in names_of] if self.groups else ["embeddings"]
        self.solvers = nn.ModuleList(self._solver(len(names), number) for number in range(len(parts)))
        self.counts = Counts(names, parts, self.decay)
        self.register_buffer("newest_weights", torch.ones(len(parts), len(names)).double(), persistent=False)

    def _grouped(self, dims: dict[str, int]) -> list[list[str]]:
        """Keys of the columns of each group; a feature has several where several tables are looked up by it."""
        named = [feature for group in self.groups for feature in group]
        check_unique("grouped feature", named)
        features = {key: key.split("@")[0] for key in dims}
        for feature in named:
            if feature not in features.values():
                raise ConfigError(f"groups: no feature {feature!r}{nearest(feature, features.values())}")
        found = [[key for key in dims if features[key] in group] for group in self.groups]
        rest = [key for key in dims if features[key] not in named]
        return [*found, rest] if rest else found

    def _solver(self, num_tasks: int, number: int) -> Solver:
        if isinstance(self._weighting, str):
            return build_solver(self._weighting, num_tasks, seed=self.seed + number, **self._options)
        solver = copy.deepcopy(self._weighting)  # each Gramian has a state of its own
        return solver if isinstance(solver, Solver) else FromGramian(solver)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Cut | None:
        """The cut of one step, for the tower and the loss; None where nothing is trained.

        Args:
            sparse_features: the batch's.

        Raises:
            ConfigError: it is part of no `MTCLTrain`.
        """
        if self._plan is None:
            raise ConfigError("gradient surgery is not part of a model yet: MTCLTrain(model, gradient_surgery=...)")
        if not (self.training and torch.is_grad_enabled()):
            return None
        group = self._group()

        def weigh(
            gramians: torch.Tensor, losses: torch.Tensor | None, taking_part: torch.Tensor | None
        ) -> torch.Tensor:
            return self._weigh(gramians, losses, taking_part, group)

        return Cut(self._plan, weigh, sparse_features, group)

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks, in a process group of its own: others' collectives of the same backward pass may be under way."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.process_group) == 1:
            return None
        default = dist.group.WORLD
        if self._own_group is None or self._own_group[0] is not default:
            if self.process_group is None:
                group: Any = dist.new_group()
            else:
                group = dist.new_group(dist.get_process_group_ranks(self.process_group), use_local_synchronization=True)
            self._own_group = default, group
        return self._own_group[1]

    @torch.no_grad()
    def _weigh(
        self,
        gramians: torch.Tensor,
        losses: torch.Tensor | None,
        taking_part: torch.Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """Weights (P, T), the same on all ranks, from this rank's part of P Gramians."""
        num_tasks = gramians.shape[-1]
        if losses is None:
            if any(solver.needs_losses for solver in self._solvers()):
                raise ValueError(
                    "this gradient surgery looks at the tasks' losses, which the loss did not tell the cut"
                )
            losses = gramians.new_zeros(num_tasks)
        losses = losses.double()
        if group is not None:
            ranks = dist.get_world_size(group)
            # A rank's loss is its share times the number of ranks, see MultiTaskLoss.
            everything = torch.cat([gramians.flatten() / ranks**2, losses / ranks])
            dist.all_reduce(everything, group=group)
            gramians, losses = everything[:-num_tasks].view_as(gramians), everything[-num_tasks:]
        gramians = (gramians + gramians.mT) / 2  # symmetric up to rounding before
        finite = torch.isfinite(gramians).all(2).all(1)
        gramians = torch.where(finite.view(-1, 1, 1), gramians, 0.0)
        squared = gramians.diagonal(dim1=1, dim2=2)
        if taking_part is not None:
            squared = torch.where(taking_part, squared, 0.0)
        active = squared > 1e-20 * squared.amax(1, keepdim=True)
        pairs = active.unsqueeze(1) & active.unsqueeze(2)
        gramians = torch.where(pairs, gramians, 0.0)
        raw = torch.stack([s(g, a, losses) for s, g, a in zip(self._solvers(), gramians, active, strict=True)])
        total = torch.where(active, raw, 0.0).sum(1)
        # No weights: none active, one that is not finite, or a sum below zero, which would turn the direction round.
        told = torch.isfinite(total) & (total > 0)
        if self._solvers()[0].mean_one:
            raw = raw * (active.sum(1) / total).unsqueeze(1)
        usable = active & told.unsqueeze(1)
        weights = torch.where(usable, raw.clamp(self.min_weight, self.max_weight), 1.0)
        self.counts.record(gramians, active, weights, (usable & (weights != raw)).any(1), ~told)
        self.newest_weights.copy_(weights)
        return weights

    def _solvers(self) -> list[Solver]:
        return list(self.solvers)  # type: ignore[arg-type]

    def statistics(self) -> SurgeryStatistics:
        """What was met so far, the same on every rank.  This waits for the device."""
        return self.counts.read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own_group": None}  # a process group cannot be copied


def _columns(group: Sequence[str], dims: dict[str, int]) -> Columns:
    """The columns of a group's features, neighbours joined."""
    runs: list[tuple[int, int]] = []
    column = 0
    for key, width in dims.items():
        if key in group:
            start = runs.pop()[0] if runs and runs[-1][1] == column else column
            runs.append((start, column + width))
        column += width
    return Columns(tuple(runs))
