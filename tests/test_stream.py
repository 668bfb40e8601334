"""Parquet as a stream: decoded elsewhere, ahead and in order; in lockstep; in little memory; with clear faults."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from mtcl_torchrec.config import StatisticsConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_rows
from mtcl_torchrec.data.stream import StreamRows, in_batches, in_order
from mtcl_torchrec.schema import ConfigError, DataError, Feature, Schema, Task

SCHEMA = Schema(
    features=[
        Feature(name="row", group="user", encoding="index", vocabulary_size=100_000),
        Feature(name="tags", group="item", kind="bag", encoding="hash", vocabulary_size=50),
        Feature(name="price", group="item", kind="dense"),
    ],
    tasks=[Task.binary("click"), Task.regression("minutes", sample_weight="w")],
)


def frame_of(start, n):
    row = np.arange(start, start + n)
    return pd.DataFrame(
        {
            "row": row,
            "tags": [f"a|{r % 7}" if r % 3 else "" for r in row],
            "price": np.where(row % 5 == 0, np.nan, row / 10),
            "click": row % 2,
            "minutes": row / 2,
            "w": 1.0,
            "unused": row,
        }
    )


def uneven_files(folder):
    """Three very uneven files of 1, 500 and 2,003 rows in row groups of up to 64."""
    start = 0
    for name, n in [("a", 1), ("b", 500), ("c", 2003)]:
        frame_of(start, n).to_parquet(folder / f"{name}.parquet", row_group_size=64, index=False)
        start += n
    return start


def fitted_stream(folder, window_rows=150, **options):
    files = ParquetFiles.open([str(folder)], window_rows=window_rows)
    encoder = FeatureEncoder(SCHEMA).fit_stream(files)
    return StreamRows(files.only(encoder.columns()), encoder.encode, seed=3, **options)


def ids_of(batch):
    return batch.sparse_features["row"].values().tolist()


# ---------------------------------------------------------------- every row, on every rank


def lockstep(folder, batch_size):
    """What each rank saw; every step waits for all ranks, so that one batch too few or too many would hang."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = fitted_stream(Path(folder))
    seen, position = [], Position()
    for batch in rows.batches(position, rank=rank, world_size=world_size, batch_size=batch_size):
        present = (~batch.labels[:, 1].isnan()).sum()
        dist.all_reduce(present)
        seen.append((int(present), ids_of(batch)))
    dist.barrier()
    dist.destroy_process_group()
    return seen, rows.steps(position, world_size=world_size, batch_size=batch_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_end_in_lockstep_whatever_the_file_sizes(tmp_path, world_size):
    n = uneven_files(tmp_path)
    ranks = run_ranks(lockstep, world_size, str(tmp_path), 100)
    counts = {len(seen) for seen, _ in ranks}
    assert counts == {steps for _, steps in ranks}
    assert len(counts) == 1
    assert Counter(row for seen, _ in ranks for _, ids in seen for row in ids) == Counter(range(n))
    totals = [total for total, _ in ranks[0][0]]
    assert totals[:-1] == [100 * world_size] * (len(totals) - 1)
    assert sum(totals) == n


def test_ranks_without_a_row_get_blank_batches(tmp_path):
    frame_of(0, 2).to_parquet(tmp_path / "a.parquet", index=False)
    rows = fitted_stream(tmp_path)
    ranks = [list(rows.batches(Position(), rank=rank, world_size=4, batch_size=8)) for rank in range(4)]
    assert [len(batches) for batches in ranks] == [1] * 4
    assert sorted(row for (batch,) in ranks for row in ids_of(batch)) == [0, 1]
    (full,), (blank,) = ranks[0], ranks[3]
    assert blank.labels.isnan().all()
    assert blank.sparse_features.values().numel() == 0
    assert blank.dense_features.shape == full.dense_features.shape == (1, 2)
    assert blank.weights.shape == full.weights.shape


def test_a_stream_gives_the_same_rows_as_reading_everything(tmp_path):
    n = uneven_files(tmp_path)
    everything = read_rows([str(tmp_path)])
    encoded = FeatureEncoder(SCHEMA).fit(everything).encode(everything)
    seen = 0
    for batch in fitted_stream(tmp_path, workers=2).batches(Position(), rank=0, world_size=1, batch_size=97):
        expected = encoded.batch(batch.sparse_features["row"].values())
        torch.testing.assert_close(batch.dense_features, expected.dense_features, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(batch.labels, expected.labels, rtol=0, atol=0)
        assert torch.equal(batch.weights, expected.weights)
        assert torch.equal(batch.sparse_features.lengths(), expected.sparse_features.lengths())
        assert torch.equal(batch.sparse_features.values(), expected.sparse_features.values())
        seen += len(batch.labels)
    assert seen == n


def test_windows_hold_whole_row_groups_of_all_files_shuffled(tmp_path):
    n = uneven_files(tmp_path)
    files = ParquetFiles.open([str(tmp_path)], window_rows=150)
    assert files.rows == n
    plain, shuffled = files.windows(), files.windows((0, 1))
    for windows in (plain, shuffled):
        assert sum(window.rows for window in windows) == n
        assert all(150 <= window.rows < 150 + 64 for window in windows[:-1])
        assert len({group for window in windows for group in window.groups}) == 1 + 8 + 32
    assert [g.start for w in plain for g in w.groups] == sorted(g.start for w in plain for g in w.groups)
    assert shuffled == files.windows((0, 1)) != files.windows((0, 2))
    assert any(len({group.file for group in window.groups}) > 1 for window in shuffled)
    for window in shuffled:
        rows = files.read(window)
        assert rows.frame["row"].tolist() == rows.frame.index.tolist()
        last = int(rows.frame["row"].iloc[-1])
        name, at = [("a", last), ("b", last - 1), ("c", last - 501)][(last > 0) + (last > 500)]
        assert rows.locate(len(rows) - 1).endswith(f"{name}.parquet, row {at}")


def test_empty_row_groups_and_empty_files_are_passed_over(tmp_path):
    table = pa.Table.from_pandas(frame_of(0, 30), preserve_index=False)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:0], table[:10], table[:0], table[10:]):
            writer.write_table(part)
    pq.write_table(table[:0], tmp_path / "b.parquet")
    batches = fitted_stream(tmp_path, 5).batches(Position(), rank=0, world_size=1, batch_size=8)
    assert Counter(row for batch in batches for row in ids_of(batch)) == Counter(range(30))
    for path in tmp_path.iterdir():
        pq.write_table(table[:0], path)
    with pytest.raises(DataError, match=r"a.parquet, .*b.parquet: no rows"):
        ParquetFiles.open([str(tmp_path)])


def test_files_are_told_apart_by_their_row_groups_wherever_they_stand(tmp_path):
    def fingerprint(folder, n, size, window_rows=50):
        (tmp_path / folder).mkdir()
        frame_of(0, n).to_parquet(tmp_path / folder / "a.parquet", row_group_size=size)
        return ParquetFiles.open([str(tmp_path / folder)], window_rows=window_rows).fingerprint

    one = fingerprint("a", 40, 10)
    assert one == fingerprint("b", 40, 10)
    assert len({one, fingerprint("c", 41, 10), fingerprint("d", 40, 20), fingerprint("e", 40, 10, 20)}) == 4


# ---------------------------------------------------------------- threads


def numbered(n=1):
    return EncodedRows(dense=torch.empty(n, 0), keys=("i",), ids=torch.arange(n)[:, None], labels=torch.zeros(n, 1))


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mtcl-data")]


def test_reading_and_encoding_happen_off_the_training_thread(tmp_path, monkeypatch):
    uneven_files(tmp_path)
    rows, threads = fitted_stream(tmp_path), set()
    read, encode = pq.ParquetFile.read_row_groups, rows.encode

    def noted(*args, **options):
        threads.add(threading.current_thread())
        return read(*args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noted)
    rows.encode = lambda part: threads.add(threading.current_thread()) or encode(part)
    assert len(list(rows.batches(Position(), rank=0, world_size=1, batch_size=500))) == 6
    assert threads
    assert all(thread.name.startswith("mtcl-data") for thread in threads)


def test_reading_threads_run_torch_alone_and_leave_the_others_as_they_are():
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # what a new thread would have, too
    try:
        assert list(in_order([torch.get_num_threads] * 3, workers=2)) == [1, 1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_few_are_made_ahead(workers):
    made, alive = [], []

    def make(i):
        time.sleep(0.002 * (i % 3))
        made.append(i)
        rows = numbered(10)
        alive.append(weakref.ref(rows))
        return deque([rows])

    most = 0
    calls = ((lambda i=i: make(i)) for i in range(12))
    for i, batch in enumerate(in_batches(in_order(calls, workers), 10)):
        assert len(batch) == 10
        assert len(made) <= i + 1 + workers
        time.sleep(0.01)
        most = max(most, sum(rows() is not None for rows in alive))
        del batch
    assert sorted(made) == list(range(12))
    assert most <= workers + 1
    assert list(in_order([lambda i=i: time.sleep(0.01 * (3 - i)) or i for i in range(4)], workers)) == [0, 1, 2, 3]


def test_what_a_worker_raises_is_raised_where_its_rows_would_come():
    def fails():
        raise DataError("x.parquet: broken")

    results = in_order([lambda: 0, lambda: 1, fails, lambda: 3], workers=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match="broken"):
        next(results)
    assert list(results) == []
    assert not data_threads()


def test_threads_end_when_the_iterator_is_closed_or_dropped(tmp_path):
    uneven_files(tmp_path)
    for drop in (True, False):
        batches = fitted_stream(tmp_path, workers=2).batches(Position(), rank=0, world_size=1, batch_size=10)
        next(batches)
        assert data_threads()
        if drop:
            del batches
            gc.collect()
        else:
            batches.close()
        assert not data_threads()


@pytest.mark.full
def test_the_interpreter_ends_beside_an_unfinished_stream():
    code = (
        "import time\n"
        "from mtcl_torchrec.data.stream import in_order\n"
        "results = in_order((lambda: time.sleep(0.2) for _ in range(10**6)), 2)\n"
        "next(results)\n"
        "print('done', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


# ---------------------------------------------------------------- memory


def peak_memory_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peaks(small, large):
    schema = Schema(
        features=[
            Feature(name="id", group="user"),
            *(Feature(name=f"x{i}", group="item", kind="dense") for i in range(12)),
        ],
        tasks=[Task.binary("click")],
    )
    measured = []
    for path in (small, large):
        preprocessor = Preprocessor(schema)
        rows = preprocessor.fit_stream(ParquetFiles.open([path], preprocessor.columns(), window_rows=32_768), seed=0)
        seen = 0
        for batch in rows.batches(Position(), rank=0, world_size=1, batch_size=8192):
            seen += len(batch.labels)
        measured.append((seen, peak_memory_mb()))
    return measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from Linux")
def test_twenty_times_the_rows_need_no_more_memory(tmp_path):
    draw = np.random.default_rng(0)
    n = 100_000
    columns = {"id": draw.integers(0, 5000, n), "click": draw.integers(0, 2, n)}
    table = pa.table(columns | {f"x{i}": draw.random(n) for i in range(12)})
    for name, times in [("small", 1), ("large", 20)]:
        with pq.ParquetWriter(tmp_path / name, table.schema, compression="none") as writer:
            for _ in range(times):
                writer.write_table(table, row_group_size=16_384)
        (tmp_path / name).rename(tmp_path / f"{name}.parquet")
    (((small, before), (large, after)),) = run_ranks(
        peaks, 1, str(tmp_path / "small.parquet"), str(tmp_path / "large.parquet")
    )
    assert (small, large) == (n, 20 * n)
    # All rows of the large file at once would take 224 MB as they are read, and half of it again encoded.
    assert after - before < 60


# ---------------------------------------------------------------- what is read, and what cannot be


def damage(path, column, byte=0.5):
    """Overwrite some bytes in the middle of a column's first chunk."""
    chunk = pq.ParquetFile(path).metadata.row_group(0)
    at = next(c for c in map(chunk.column, range(chunk.num_columns)) if c.path_in_schema == column)
    content = bytearray(path.read_bytes())
    start = at.dictionary_page_offset or at.data_page_offset
    middle = start + int(at.total_compressed_size * byte)
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_columns_that_are_not_asked_for_are_never_decoded(tmp_path, compression):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pandas(frame_of(0, 500)), path, compression=compression, write_page_checksum=True)
    damage(path, "unused")
    batches = list(fitted_stream(tmp_path).batches(Position(), rank=0, world_size=1, batch_size=100))
    assert sum(len(batch.labels) for batch in batches) == 500
    damage(path, "price")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        fitted_stream(tmp_path)


def test_only_what_is_learnt_from_is_read_when_learning(tmp_path, monkeypatch):
    uneven_files(tmp_path)
    asked, read = [], pq.ParquetFile.read_row_groups

    def noted(self, groups, columns, **options):
        asked.append(columns)
        return read(self, groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noted)
    files = ParquetFiles.open([str(tmp_path)], window_rows=100)
    FeatureEncoder(SCHEMA).fit_stream(files)
    assert {tuple(columns) for columns in asked} == {("price", "click", "minutes")}
    asked.clear()
    schema = Schema(features=SCHEMA.features[:2], tasks=SCHEMA.tasks[:1])
    FeatureEncoder(schema).fit_stream(files)
    # Only whether there is a label at all: the first window shows it (one more may be read ahead).
    assert {tuple(columns) for columns in asked} == {("click",)}
    assert len(asked) <= 4


def test_truncated_files_are_refused_by_name_when_they_are_opened(tmp_path):
    uneven_files(tmp_path)
    path = tmp_path / "b.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        ParquetFiles.open([str(tmp_path)])
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        ParquetFiles.open([str(tmp_path)])


def test_a_file_that_breaks_or_changes_during_training_is_refused_by_name(tmp_path):
    uneven_files(tmp_path)
    rows, path = fitted_stream(tmp_path), tmp_path / "c.parquet"
    whole = path.read_bytes()

    def message():
        with pytest.raises(DataError) as caught:
            list(rows.batches(Position(), rank=0, world_size=1, batch_size=100))
        return str(caught.value)

    path.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2))
    assert f"{path}: cannot be read" in message()
    frame_of(0, 2003).to_parquet(path, row_group_size=50, index=False)
    assert f"{path}: the file has changed" in message()
    path.write_bytes(whole)  # what is known of its footer is not that of the file in between
    assert sum(len(b.labels) for b in rows.batches(Position(), rank=0, world_size=1, batch_size=100)) == 2504
    path.unlink()
    assert f"{path}: cannot be read" in message()


def test_files_that_cannot_be_streamed_are_refused(tmp_path):
    frame_of(0, 5).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column 'clik' \(did you mean 'click'\?\)"):
        ParquetFiles.open([str(tmp_path)], ["row", "clik"])
    frame_of(0, 5).drop(columns="price").to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: no column 'price'"):
        ParquetFiles.open([str(tmp_path)], ["row", "price"])
    with pytest.raises(DataError, match=r"no column 'rows' \(did you mean 'row'\?\)"):
        ParquetFiles.open([str(tmp_path)], ["row"]).only(["rows"])
    frame_of(0, 5).assign(row=pd.Timestamp("2024")).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="columns differ in kind"):
        ParquetFiles.open([str(tmp_path)], ["row"])
    frame_of(0, 5).to_csv(tmp_path / "c.csv")
    with pytest.raises(DataError, match=r"c.csv: only Parquet files can be streamed"):
        ParquetFiles.open([str(tmp_path / "c.csv")])
    with pytest.raises(DataError, match="no Parquet or CSV file at"):
        ParquetFiles.open([str(tmp_path / "nothing")])


def test_a_value_that_does_not_fit_names_its_file_and_row_and_comes_after_the_rows_before_it(tmp_path):
    uneven_files(tmp_path)
    rows = fitted_stream(tmp_path)
    frame_of(501, 2003).assign(click=lambda f: f["click"].where(f["row"] != 501 + 70, 7)).to_parquet(
        tmp_path / "c.parquet", row_group_size=64, index=False
    )
    files = ParquetFiles.open([str(tmp_path)], window_rows=150)
    rows.source = files.only(rows.source.schema.names)
    seen = []
    batches = rows.batches(Position(), rank=0, world_size=1, batch_size=50)
    with pytest.raises(DataError, match=r"c\.parquet, row 70: click = 7; a label of binary task 'click' is 0 or 1"):
        seen.extend(row for batch in batches for row in ids_of(batch))
    windows = files.windows((3, 1))
    bad = next(i for i, w in enumerate(windows) if any(g.start <= 571 < g.start + g.rows for g in w.groups))
    good = sum(window.rows for window in windows[:bad])
    assert len(seen) == good // 50 * 50


# ---------------------------------------------------------------- the preprocessor


def test_a_preprocessor_learns_from_files_what_it_learns_in_memory(tmp_path):
    schema = Schema(features=SCHEMA.features, tasks=SCHEMA.tasks, user="row", item="tags")
    uneven_files(tmp_path)
    one, other = Preprocessor(schema), Preprocessor(schema)
    encoded = one.fit(read_rows([str(tmp_path)], one.columns()))
    rows = other.fit_stream(ParquetFiles.open([str(tmp_path)], other.columns()), seed=0)
    assert rows.rows_per_epoch == len(encoded)
    assert one._is_text == other._is_text == {"row": False, "tags": True}
    other.save(tmp_path / "stored")
    again = Preprocessor.load(tmp_path / "stored", schema, ()).stream(
        ParquetFiles.open([str(tmp_path / "*.parquet")], other.columns()), seed=0
    )
    both = (of.batches(Position(2), rank=1, world_size=2, batch_size=400) for of in (rows, again))
    for first, second in zip(*both, strict=True):
        assert ids_of(first) == ids_of(second)
        assert torch.equal(first.dense_features, second.dense_features)


def test_statistics_must_be_prepared_before_a_stream(tmp_path):
    schema = Schema(features=SCHEMA.features[:1], tasks=SCHEMA.tasks[:1], time="t")
    block = StatisticsConfig(keys=["row"], outcomes=["click"])
    frame = frame_of(0, 50).assign(t=range(50))
    counting = Preprocessor(schema, [block])
    prepared = counting.fit_statistics(Rows(frame))
    prepared.frame.to_parquet(tmp_path / "train.parquet")
    counting.statistics[0].save(tmp_path / "statistics_0")
    files = [str(tmp_path / "train.parquet")]
    with pytest.raises(ConfigError, match="run `mtcl prepare` first"):
        counting.fit_stream(ParquetFiles.open(files), seed=0)
    ready = Preprocessor(schema, [block.model_copy(update={"prepared": str(tmp_path / "statistics_0")})])
    rows = ready.fit_stream(ParquetFiles.open(files, ready.columns()), seed=0)
    expected = FeatureEncoder(ready.schema).fit(prepared).encode(prepared)
    (batch,) = rows.batches(Position(), rank=0, world_size=1, batch_size=50)
    torch.testing.assert_close(batch.dense_features, expected.dense[batch.sparse_features["row"].values()])
    assert batch.dense_features.shape[1] > 0


def test_lists_name_no_user_in_a_stream_either(tmp_path):
    frame_of(0, 5).assign(who=[[1]] * 5).to_parquet(tmp_path / "a.parquet")
    schema = Schema(features=SCHEMA.features, tasks=SCHEMA.tasks, user="who")
    with pytest.raises(DataError, match="column 'who' holds lists"):
        Preprocessor(schema).fit_stream(ParquetFiles.open([str(tmp_path)]), seed=0)
