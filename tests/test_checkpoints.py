"""Checkpoints: resuming is the same as never having stopped, any cut reads any other's, and faults leave a good one."""

import gc
import json
import pickle
import resource
import shutil

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_distributed import GLOBAL_BATCH, cut, optimizers, rows, train_module
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.training_rows import MemoryRows
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.averaging import WeightAverage
from mtcl_torchrec.training.checkpoint.reader import SafeReader, read_tensors
from mtcl_torchrec.training.checkpoint.state import TrainingState, optimizer_tensors
from mtcl_torchrec.training.checkpoint.store import CheckpointStore, best_checkpoint, newest_checkpoint, read_about
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.sharding import ranks, tables_of

STEPS = 10


def new_state(where, sharding, kind, averaging=0.9, module=None):
    model, optimizer = parallelise(module or train_module(), where, optimizers(kind), sharding=cut(sharding), seed=3)
    return TrainingState(
        model, optimizer, build_schedule(optimizer, 3, STEPS, "linear"),
        WeightAverage(model, averaging) if averaging else None,
    )  # fmt: skip


def train(state, where, steps):
    """Some steps, with draws from the random generator in each."""
    pipeline = build_pipeline(state.model, state.optimizer, where.device)
    batch, losses = GLOBAL_BATCH // where.world_size, []
    batches = MemoryRows(rows(), seed=1).batches(
        state.position, rank=where.rank, world_size=where.world_size, batch_size=batch
    )
    state.model.train()
    for _ in range(steps):
        loss, *_ = pipeline.progress(batches)
        state.step += 1
        state.schedule.step()
        state.position = state.position.after(1, world_size=where.world_size, batch_size=batch)
        if state.average is not None:
            state.average.update()
        losses.append((loss.item(), torch.rand(1).item()))
    return losses


def whole(tensors, where):
    """The sharded tensors put together, on every rank; random generators left out."""
    result = {}
    for part in where.gather({n: [(t.detach().float().numpy().copy(), o) for t, *o in local_shards_of(v)]
                              for n, v in tensors.items() if not n.startswith("random.")}):  # fmt: skip
        for name, shards in part.items():
            result.setdefault(name, []).extend(shards)
    return result


def local_shards_of(value):
    if hasattr(value, "to_local"):
        local = value.to_local()
        return [(t, *o) for t, o in zip(local.local_shards(), local.local_offsets(), strict=False)]
    return [(value, *([0] * value.dim()))]


def dense_of(parts, shapes):
    """name -> array of the whole tensor."""
    found = {}
    for name, shards in parts.items():
        array = np.full(shapes[name], np.nan, np.float32)
        for tensor, offset in shards:
            if tensor.size or tensor.ndim == 0:
                array[tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))] = tensor
        found[name] = array
    return found


def everything(state, where):
    tensors = state.tensors(where)
    shapes = {}
    for part in where.gather({n: tuple(v.shape) for n, v in tensors.items()}):
        shapes |= part
    return dense_of(whole(tensors, where), shapes)


def never_stopped(sharding, kind, averaging):
    with ranks("cpu") as where:
        torch.manual_seed(where.rank)
        state = new_state(where, sharding, kind, averaging)
        losses = train(state, where, STEPS)
        result = everything(state, where), losses
        del state
        return result


def stopped_at(folder, sharding, kind, averaging, step, background):
    with ranks("cpu") as where:
        torch.manual_seed(where.rank)
        state = new_state(where, sharding, kind, averaging)
        train(state, where, step)
        store = CheckpointStore(folder, where)
        about = {"step": state.step, "position": state.position.to_json(), "history": {"best_step": 0}}
        store.save(state.tensors(where, copy=background), about, background=background)
        if background:
            train(state, where, 2)  # goes on over the tensors that are being written
        store.close()
        assert store.failure(wait=True) is None
        del state


def resumed(folder, sharding, kind, averaging):
    with ranks("cpu") as where:
        torch.manual_seed(99)
        checkpoint = newest_checkpoint(folder)
        about = read_about(checkpoint)
        state = new_state(where, sharding, kind, averaging)
        state.step = state.scheduled = state.averaged = about["step"]
        state.position = Position.from_json(about["position"])
        state.load(checkpoint, where)
        losses = train(state, where, STEPS - state.step)
        result = everything(state, where), losses
        del state
        return result


CASES = {
    1: [("auto", "rowwise_adagrad", 0.9, True)],
    2: [
        ("row_wise", "rowwise_adagrad", 0.0, True),
        ("column_wise", "adagrad", 0.9, False),
        ("data_parallel", "rowwise_adagrad", 0.0, False),
        ("row_wise", "adam", 0.9, True),
        ("table_wise", "sgd", 0.0, False),
    ],
}


def each(fn, cases):
    """What `fn` gives of each case, one after the other: starting ranks takes seconds."""
    results = []
    for case in cases:
        results.append(fn(*case))
        gc.collect()
    return results


@pytest.mark.parametrize("world_size", CASES)
def test_resuming_is_bit_equal_to_never_having_stopped(tmp_path, world_size):
    cases = [(tmp_path / str(number), *case) for number, case in enumerate(CASES[world_size])]
    expected = run_ranks(each, world_size, never_stopped, [case[1:4] for case in cases])
    run_ranks(each, world_size, stopped_at, [(*case[:4], 4, case[4]) for case in cases])
    resumed_ones = run_ranks(each, world_size, resumed, [case[:4] for case in cases])
    for results, expected_results in zip(resumed_ones, expected, strict=True):
        for case, (state, losses), (expected_state, expected_losses) in zip(
            cases, results, expected_results, strict=True
        ):
            assert losses == expected_losses[4:], case  # the losses, and what the random generator drew
            assert set(state) == set(expected_state)
            for name, value in expected_state.items():
                np.testing.assert_array_equal(state[name], value, err_msg=f"{case} {name}")


def test_a_checkpoint_is_read_on_any_number_of_ranks_and_any_sharding(tmp_path):
    """Row-wise on two ranks into one, four, and other cuts: the same parameters and optimizer states."""
    cuts = {
        "rowwise_adagrad": [(1, "auto"), (4, "row_wise"), (2, "table_wise"), (2, "data_parallel")],
        "adam": [(1, "auto"), (2, "column_wise"), (4, "row_wise")],
        "adagrad": [(2, "column_wise"), (1, "data_parallel")],
    }
    wanted = [(tmp_path / kind, "row_wise", kind) for kind in cuts]
    # From data-parallel, whose states have other names and shapes, into a sharded table.
    parallel = (tmp_path / "dp", "data_parallel", "rowwise_adagrad")
    *saved, saved_parallel = run_ranks(each, 2, save_and_show, [*wanted, parallel])[0]
    saved = dict(zip(cuts, saved, strict=True))
    for world_size in (1, 2, 4):
        cases = [(tmp_path / kind, s, kind) for kind, of in cuts.items() for n, s in of if n == world_size]
        cases += [(tmp_path / "dp", "row_wise", "rowwise_adagrad")] if world_size == 2 else []
        by_rank = run_ranks(each, world_size, load_and_show, cases)
        for (folder, sharding, kind), *loaded_ones in zip(cases, *by_rank, strict=True):
            if folder.name == "dp":
                continue
            for loaded in loaded_ones:
                for name, value in saved[kind].items():
                    if not name.endswith("/step"):
                        np.testing.assert_array_equal(loaded[name], value, err_msg=f"{kind} {sharding} {name}")
        if world_size == 2:
            loaded = by_rank[0][-1]
            sums = [n for n in loaded if n.endswith("/sum")]
            assert len(sums) == len(tables_of(train_module("cpu")))
            for name in sums:
                assert loaded[name].ndim == 1
                np.testing.assert_array_equal(loaded[name], saved_parallel[name])


def save_and_show(folder, sharding, kind):
    with ranks("cpu") as where:
        state = new_state(where, sharding, kind)
        train(state, where, 4)
        store = CheckpointStore(folder, where)
        store.save(state.tensors(where), {"step": 4, "history": {"best_step": 4}})
        store.close()
        result = everything(state, where)
        del state
        return result


def load_and_show(folder, sharding, kind):
    with ranks("cpu") as where:
        state = new_state(where, sharding, kind)
        state.step = state.averaged = 4
        state.load(best_checkpoint(folder), where)
        assert state.average.steps == 4
        result = everything(state, where)
        del state
        return result


def test_optimizer_states_of_sharded_tables_are_not_taken_for_the_whole():
    """An ordinary Adam over row-wise shards keeps plain tensors of its own rows on each rank."""
    for shapes in run_ranks(shapes_of_states, 2):
        assert shapes["model.embedding_bag_collection.embedding_bags.t_users.weight/exp_avg"] == (203, 8)


def shapes_of_states():
    with ranks("cpu") as where:
        state = new_state(where, "row_wise", "adam")
        train(state, where, 1)
        shapes = {n: tuple(v.shape) for n, v in optimizer_tensors(state.model, state.optimizer).items()}
        del state
        return shapes


# ---------------------------------------------------------------- the store


@pytest.fixture
def alone():
    with ranks("cpu") as where:
        yield where


def numbered(step, best=0):
    return {"step": step, "history": {"best_step": best}}


def test_the_newest_few_and_the_best_are_kept(alone, tmp_path):
    store = CheckpointStore(tmp_path, alone, keep=2)
    for step in (10, 20, 30, 40):
        store.save({"a": torch.ones(2)}, numbered(step, best=10))
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000010", "step_000000030", "step_000000040"]
    assert newest_checkpoint(tmp_path).name == "step_000000040"
    assert best_checkpoint(tmp_path).name == "step_000000010"


def test_what_a_crash_left_unfinished_is_no_checkpoint_and_goes(alone, tmp_path):
    store = CheckpointStore(tmp_path, alone)
    store.save({"a": torch.ones(2)}, numbered(1))
    shutil.copytree(tmp_path / "step_000000001", tmp_path / "step_000000002.writing")
    shutil.copytree(tmp_path / "step_000000001", tmp_path / "step_000000003")
    (tmp_path / "step_000000003/state.json").unlink()
    assert newest_checkpoint(tmp_path).name == "step_000000001"
    store.close()
    CheckpointStore(tmp_path, alone).close()
    assert not (tmp_path / "step_000000002.writing").exists()


def fill_the_disk(folder, background):
    """A limit on the size of files stands for a full disk: the write fails half-way."""
    with ranks("cpu") as where:
        store = CheckpointStore(folder, where)
        store.save({f"a{where.rank}": torch.ones(10)}, numbered(1, best=1))
        if where.rank == where.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        big = {f"a{where.rank}": torch.ones(10**6)}
        said = None
        if background:
            store.save(big, numbered(2, best=1), background=True)
            said = store.failure(wait=True)
        else:
            with pytest.raises(OSError, match="step_000000002 could not be written") as caught:
                store.save(big, numbered(2, best=1))
            said = str(caught.value)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.save({f"a{where.rank}": torch.ones(10)}, numbered(3, best=1))  # there is room again
        store.close()
        return said


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path, world_size, background):
    for said in run_ranks(fill_the_disk, world_size, tmp_path, background):
        assert "the last good one is step_000000001" in said
        assert "GB are free there" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000001", "step_000000003"]


# ---------------------------------------------------------------- reading


def test_objects_in_the_place_of_tensors_are_refused(alone, tmp_path):
    """torch would unpickle them without restriction."""
    store = CheckpointStore(tmp_path, alone)
    store.save({"a": torch.ones(2)}, numbered(1))
    store.close()
    folder = newest_checkpoint(tmp_path)
    metadata = SafeReader(folder).read_metadata()
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match="a is no tensor there"):
        read_tensors({"a": torch.zeros(2)}, folder)


def test_tables_may_have_grown_and_nothing_else(alone, tmp_path):
    store = CheckpointStore(tmp_path, alone)
    name = "weights.model.embedding_bag_collection.embedding_bags.table_t.weight"
    saved = torch.arange(12.0).view(6, 2)
    store.save({name: saved, "weights.other": saved}, numbered(1))
    store.close()
    folder = newest_checkpoint(tmp_path)
    grown = torch.full((9, 2), -1.0)
    read_tensors({name: grown}, folder)
    assert torch.equal(grown[:6], saved)
    assert (grown[6:] == -1).all()
    for wanted in ({name: torch.zeros(5, 2)}, {name: torch.zeros(6, 4)}, {"weights.other": torch.zeros(9, 2)}):
        with pytest.raises(DataError, match="Size mismatch"):
            read_tensors(wanted, folder)
    with pytest.raises(DataError, match="no checkpoint of this model"):
        read_tensors({"weights.absent": torch.zeros(1)}, folder)


def test_what_stands_beside_the_tensors_is_json(alone, tmp_path):
    store = CheckpointStore(tmp_path, alone)
    store.save({"a": torch.ones(2)}, numbered(7))
    store.close()
    assert json.loads((newest_checkpoint(tmp_path) / "state.json").read_text())["step"] == 7
