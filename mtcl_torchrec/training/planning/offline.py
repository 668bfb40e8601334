"""What a run would cost on a cluster that is not there: where its tables go, what each rank holds, how long a step
takes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Topology
from torchrec.distributed.planner.utils import reset_shard_rank
from torchrec.sparse.jagged_tensor import JaggedTensor

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.contents import read_contents
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.models import MTCL, MTCLTrain, MultiTaskTower
from mtcl_torchrec.modules.embeddings import pooled_by_key, table_module_name
from mtcl_torchrec.modules.sequences import Sequences
from mtcl_torchrec.schema import GROUPS, ConfigError, Feature, Schema, nearest
from mtcl_torchrec.training.build import build_model, for_modules
from mtcl_torchrec.training.optimizers import fuse_table_optimizer, is_fused
from mtcl_torchrec.training.planning.constraints import table_configs, table_constraints
from mtcl_torchrec.training.planning.hardware import GB, Hardware, configured, known_hardware
from mtcl_torchrec.training.planning.planner import (
    Search,
    complete,
    plan_as_json,
    quiet_planner,
    state_numbers,
    table_sharders,
    topology,
)
from mtcl_torchrec.training.planning.report import PHASES, Phase, PlanReport, RankMemory, TablePlan

RANKS_PER_HOST = 8  # GPUs in a server
MOST_ROWS = 10**13  # of one table


class UnfittedEncoder(FeatureEncoder):
    """Stands in for an encoder that has seen no data: every dense feature may be missing somewhere.

    Args:
        schema: every sparse feature with its vocabulary_size; the files of vectors and codes are read.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__(schema)
        self._dense = {f.name: (0.0, 1.0, f.mark_missing) for f in schema.dense_features}
        self._contents = self._read_contents(FeatureEncoder(schema))


def plan_offline(
    run: RunConfig,
    world_size: int,
    device: str = "h200",
    *,
    batch_size: int | None = None,
    num_rows_of: Mapping[str, int] | None = None,
    ranks_per_host: int | None = None,
    fitted: FeatureEncoder | None = None,
    timeout_s: float | None = 120.0,
) -> PlanReport:
    """Plan a run for a cluster that is not there.  Needs no process group, no GPU and no data.

    Tables live on the meta device.  Dense parameters are counted as built: 4 bytes each for the parameter, its gradient
    and each state of its optimizer.  Activations are what autograd keeps of a row for backward, as measured here on a
    small batch in fp32, doubled for their gradients.  Times are TorchRec's estimates from bandwidths; measure before
    you buy.

    Args:
        run: its sharding part says what the planner may do.
        device: a name in `mtcl_torchrec.training.planning.hardware.KNOWN`.
        batch_size: rows a step and rank; the default is the run's.
        num_rows_of: table -> rows, before what the schema says.
        ranks_per_host: the default is the run's, or 8, or fewer where there are fewer ranks.
        fitted: encoder of a run that was trained, which knows the vocabularies that were learnt.
        timeout_s: the planner tries no further proposal after this; None lets it finish.

    Raises:
        ConfigError: a table's rows are not known, the device is not, or what is configured cannot be done.
    """
    hardware = configured(known_hardware(device), run.sharding)
    batch_size = batch_size or run.training.batch_size
    full_host = ranks_per_host or run.sharding.ranks_per_host or RANKS_PER_HOST
    hosts_of = min(full_host, world_size)
    schema = _sized_schema(run, num_rows_of or {}, fitted)
    model = build_model(run.model, UnfittedEncoder(schema), run.fusion)
    memory = _rank_memory(run, model, hardware, batch_size, hosts_of)
    module = MTCLTrain(model)
    optimizers, sharding = for_modules(run)
    tables = optimizers.tables
    fuse_table_optimizer(module, tables)  # tells the planner the size of the optimizer's state
    sharders = table_sharders(sharding)
    constraints = table_constraints(
        module, sharding, device_type=hardware.kind, world_size=world_size, ranks_per_host=hosts_of,
        optimizer=tables.kind,
    )  # fmt: skip
    taken = memory.dense + memory.activations
    cluster = topology(hardware, world_size, hosts_of, reserve=sharding.reserve, taken_gb=taken)
    search = Search(cluster, constraints, batch_size, timeout_s)
    names = {table_module_name(table): table for table in run.model.tables(schema)}
    report = PlanReport(
        run.name, device, world_size, hosts_of, batch_size, memory, 0.0, None, "", _unplaced(module, names, tables.kind)
    )
    started = time.perf_counter()
    with quiet_planner():
        try:
            plan, chosen = search.best(module, sharders)
        except PlannerError:
            options = search.options(module, sharders)
            shortfall, hint = _shortfall(options, search, memory, hardware, names, full_host)
            return replace(report, planning_s=time.perf_counter() - started, shortfall=shortfall, hint=hint)
    seconds = time.perf_counter() - started
    complete(plan, sharding, fused=is_fused(tables, torch.device(hardware.kind)))
    return _placed(replace(report, planning_s=seconds, plan=plan_as_json(plan)), chosen, hardware, names)


def parse_rows(texts: Sequence[str]) -> dict[str, int]:
    """Table -> rows, from texts such as ``"user_id=2_000_000"``.

    Raises:
        ConfigError: a text is no such pair.

    Example:
        >>> parse_rows(["user_id=2_000_000", "item=5e6"])
        {'user_id': 2000000, 'item': 5000000}
    """
    rows = {}
    for text in texts:
        table, _, number = text.partition("=")
        try:
            rows[table.strip()] = int(float(number.replace("_", "").replace(",", "")))
            if not 2 <= rows[table.strip()] <= MOST_ROWS:
                raise ValueError
        except (ValueError, OverflowError):
            raise ConfigError(
                f"--rows takes table=N, such as user_id=2_000_000, not {text!r} (2 to {MOST_ROWS:,} rows)"
            ) from None
    return rows


def _sized_schema(run: RunConfig, given: Mapping[str, int], fitted: FeatureEncoder | None) -> Schema:
    """The schema, statistics included, with the rows of every table."""
    schema = run.data_schema
    tables = schema.tables()
    for table, rows in given.items():
        if table not in tables:
            raise ConfigError(f"rows of table {table!r}: there is no such table{nearest(table, tables)}")
        if rows < 2:
            raise ConfigError(f"rows of table {table!r}: {rows} is too few; row 0 is 'unknown'")
    sizes = {table: given.get(table, features[0].vocabulary_size) for table, features in tables.items()}
    if fitted is not None:
        learnt = fitted.schema.tables()
        sizes = {t: n if n is not None or t not in learnt else fitted.num_embeddings(t) for t, n in sizes.items()}
    for table, of in tables.items():
        if sizes[table] is None and of[0].has_content:
            sizes[table] = len(read_contents(of[0])) + 1
    unknown = [table for table, rows in sizes.items() if rows is None]
    if unknown:
        raise ConfigError(
            f"the rows of table{'s' * (len(unknown) > 1)} {', '.join(unknown)} are learnt from the data, which a plan "
            f"does not read: give --rows {unknown[0]}=N, vocabulary_size in the schema, or a trained run with --fitted"
        )
    features = [
        f if not f.has_table else f.model_copy(update={"vocabulary_size": sizes[f.table_name]}) for f in schema.features
    ]
    blocks = [block.model_copy(update={"prepared": None}) for block in run.statistics]
    counted = [column for block in Preprocessor(schema, blocks).statistics for column in block.columns()]
    features += [Feature(name=column, group=GROUPS, kind="dense", mark_missing=False) for column in counted]
    return schema.model_copy(update={"features": tuple(features)})


def _rank_memory(run: RunConfig, model: MTCL, hardware: Hardware, batch_size: int, ranks_per_host: int) -> RankMemory:
    total = hardware.memory_gb if hardware.kind == "cuda" else hardware.host_memory_gb / ranks_per_host
    parameters = sum(p.numel() for part in (model.tower, model.lookups) for p in part.parameters())
    frozen = sum(buffer.nbytes for buffer in model.lookups.buffers())  # vectors, of which each rank has a copy
    states = 0 if run.optimizers.dense.kind == "sgd" else 2
    sequences = next((module for module in model.lookups if isinstance(module, Sequences)), None)
    per_row = saved_for_backward(model.tower, sum(model.lookups.dims.values()), model.lookups.dims, sequences)
    return RankMemory(
        total=total,
        reserve=total * run.sharding.reserve,
        dense=(parameters * 4 * (2 + states) + frozen) / GB,
        activations=2 * per_row * batch_size / GB,
    )


def saved_for_backward(
    tower: MultiTaskTower, width: int, dims: Mapping[str, int] | None = None, sequences: Sequences | None = None
) -> float:
    """Bytes that autograd keeps of each row between forward and backward, parameters apart.

    Args:
        tower: on the CPU.
        width: of all inputs together.
        dims: key of each input -> its width, where there are histories.
        sequences: the histories, which are taken to be half as long as they may be; on the CPU.
    """
    modules = [tower] if sequences is None else [tower, sequences]
    own = {p.untyped_storage().data_ptr() for m in modules for p in [*m.parameters(), *m.buffers()]}

    def kept(rows: int) -> int:
        seen: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = tensor
            return tensor

        pooled: Any = torch.zeros(rows, width, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if sequences is not None and dims is not None:
                pooled = pooled_by_key(pooled, dims) | _half_full(sequences, rows)
            logits = tower(torch.zeros(rows, tower.dense_in_features), pooled)
        size = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
        del logits
        return size

    return (kept(16) - kept(8)) / 8


def _half_full(sequences: Sequences, rows: int) -> dict[str, Any]:
    """What histories of half their cap become, in each of some rows."""
    found: dict[str, JaggedTensor] = {}
    for name, width in sequences.widths.items():
        length = max(1, sequences.lengths.get(name, 1) // 2)
        lengths = torch.full((rows,), length)
        found[name] = JaggedTensor(torch.zeros(rows * length, width, requires_grad=True), lengths=lengths)
    ids = {name: JaggedTensor(of.values().long()[:, 0], lengths=of.lengths()) for name, of in found.items()}
    return sequences(ids, found)


def _state_bytes(optimizer: str, dim: int) -> int:
    """Bytes of optimizer state for each row of a table."""
    return {"sgd": 0, "rowwise_adagrad": 4, "adagrad": 4 * dim, "adam": 8 * dim}[optimizer]


def _unplaced(module: nn.Module, names: Mapping[str, str], optimizer: str) -> list[TablePlan]:
    tables = []
    for name, config in table_configs(module).items():
        width = {"FP32": 4, "FP16": 2, "BF16": 2}[config.data_type.value]
        row = config.embedding_dim * width + _state_bytes(optimizer, config.embedding_dim)
        gb = config.num_embeddings * row / GB
        tables.append(TablePlan(names[name], config.num_embeddings, config.embedding_dim, gb, "", "", (), 0.0))
    return tables


def _memory_of(shard: Any, hardware: Hardware) -> float:
    return (shard.storage.hbm if hardware.kind == "cuda" else shard.storage.ddr) / GB


def _placed(
    report: PlanReport, chosen: list[ShardingOption], hardware: Hardware, names: Mapping[str, str]
) -> PlanReport:
    """The report of a plan that was found."""
    ranks = range(report.world_size)
    used, host = [0.0 for _ in ranks], [0.0 for _ in ranks]
    times = {phase: [0.0 for _ in ranks] for phase in PHASES}
    of_table = {names[option.name]: option for option in chosen}
    for option in chosen:
        for shard in option.shards:
            used[shard.rank] += _memory_of(shard, hardware)
            host[shard.rank] += shard.storage.ddr / GB if hardware.kind == "cuda" else 0.0
            for phase in PHASES:
                times[phase][shard.rank] += getattr(shard.perf, phase)
    tables = []
    for table in report.tables:
        option = of_table[table.name]
        parameter = report.plan[option.name]
        copies = len(option.shards) if option.sharding_type == "data_parallel" else 1
        tables.append(
            replace(
                table,
                gb=table.gb * copies,
                kind=option.sharding_type,
                kernel=parameter["kernel"],
                ranks=tuple(sorted({shard.rank for shard in option.shards if 0 not in shard.size})),
                largest_gb=max(_memory_of(shard, hardware) for shard in option.shards),
            )
        )
    phases = {phase: Phase(sum(ms) / len(ms), max(ms)) for phase, ms in times.items() if max(ms) > 0}
    return replace(report, tables=tables, used_gb=used, host_gb=host, phases=phases)


def _shortfall(
    options: list[ShardingOption],
    search: Search,
    memory: RankMemory,
    hardware: Hardware,
    names: Mapping[str, str],
    full_host: int,
) -> tuple[str, str]:
    """Why no plan fits, with the least memory that would do, and what helps."""
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name, []).append(option)

    def largest(option: ShardingOption) -> float:
        return max(_memory_of(shard, hardware) for shard in option.shards)

    def whole(option: ShardingOption) -> float:
        return sum(_memory_of(shard, hardware) for shard in option.shards)

    finest = [min(of, key=lambda o: (largest(o), whole(o))) for of in by_table.values()]
    smallest = [min(of, key=lambda o: (whole(o), largest(o))) for of in by_table.values()]
    world, free = search.cluster.world_size, memory.for_tables
    needed = min(_least_memory(proposal, search.cluster, hardware) for proposal in (finest, smallest))
    total, worst = sum(map(whole, smallest)), max(finest, key=largest)
    if needed <= free:
        host = sum(shard.storage.ddr for option in finest for shard in option.shards) / GB
        return (
            f"Does not fit: short of host memory, of which the tables need {host:,.1f} GB",
            "Take more hosts, say host_memory_gb where they have more, or keep more tables in device memory.",
        )
    ranks = f"each of {world} ranks" if world > 1 else "the one rank"
    short = f"Does not fit: short by {needed - free:,.1f} GB on {ranks}"
    piece = largest(worst)
    # More ranks would not cut it further; one rank is offered no cuts at all.
    stuck = piece > free and worst.sharding_type != "row_wise" and world > 1
    if total > free * world and not stuck:
        cause = f"the tables need {total:,.1f} GB, and {free * world:,.1f} GB are there for them"
    elif piece > free:
        cause = (
            f"the smallest piece that table {names[worst.name]!r} may be cut into ({worst.sharding_type}) takes "
            f"{piece:,.1f} GB, a rank has {free:,.1f} GB for tables"
        )
    else:
        cause = f"the pieces of the tables need {needed:,.1f} GB of a rank, which has {free:,.1f} GB for them"
    return f"{short}: {cause}", _hint(worst, total / free, search, full_host, cuttable=not stuck)


def _hint(worst: ShardingOption, ranks_filled: float, search: Search, full_host: int, *, cuttable: bool) -> str:
    """What helps, the surest first.

    Args:
        ranks_filled: how many ranks the tables would fill.
        full_host: ranks of a whole host.
    """
    ways = []
    if not cuttable and "row_wise" not in (search.constraints[worst.name].sharding_types or []):
        ways.append("row_wise for that table")
    elif ranks_filled > search.cluster.world_size:
        ranks = math.ceil(ranks_filled)
        # Several hosts are planned as full ones.
        ways.append(f"at least {ranks if ranks <= full_host else math.ceil(ranks / full_host) * full_host} ranks")
    else:
        ways.append("more ranks")
    if state_numbers(worst.tensor):
        ways.append("rowwise_adagrad, which keeps one number of state a row")
    if worst.tensor.element_size() == 4:
        ways.append("data_type: fp16 for large tables")
    if search.cluster.compute_device == "cuda":
        cached = "fused_uvm_caching" in (search.constraints[worst.name].compute_kernels or [])
        ways.append("a smaller cache_load_factor" if cached else "compute_kernels: fused_uvm_caching (host memory)")
    ways.append("fewer rows (min_count, hash)")
    return f"What helps: {'; '.join(ways)}."


def _least_memory(proposal: list[ShardingOption], cluster: Topology, hardware: Hardware) -> float:
    """The least memory of a rank, in 10⁹ bytes and to a hundredth, with which this proposal finds places."""

    def fits(gb: float) -> bool:
        for device in cluster.devices:
            device.storage.hbm = int(gb * GB) if hardware.kind == "cuda" else 0
            device.storage.ddr = int((gb if hardware.kind == "cpu" else hosts[device.rank]) * GB)
        try:
            GreedyPerfPartitioner().partition(proposal, cluster)
        except PlannerError:
            return False
        finally:
            reset_shard_rank(proposal)
        return True

    before = [(device.storage.hbm, device.storage.ddr) for device in cluster.devices]
    hosts = [float("1e9") for _ in before]  # host memory is looked at apart
    low, high = 0.0, sum(_memory_of(shard, hardware) for option in proposal for shard in option.shards)
    try:
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
    finally:
        for device, (hbm, ddr) in zip(cluster.devices, before, strict=True):
            device.storage.hbm, device.storage.ddr = hbm, ddr
    return high
