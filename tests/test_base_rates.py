"""Heads start at the base rates of the training rows: how they are counted, what a model makes of them, whole runs."""

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
import shop
import torch
import torch.distributed as dist
from ranks import run_ranks
from rich.console import Console
from test_faults import state_of
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, MTBatch, SharedBottom, Task
from mtcl_torchrec.baselines.networks import single_task
from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.data.base_rates import LabelTotals, stream_totals
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.data.world_windows import WorldWindow, world_of
from mtcl_torchrec.data.worlds import world_run
from mtcl_torchrec.modules.chains import Chains
from mtcl_torchrec.modules.heads import starting_logits
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.schema import DataError, Feature, Schema
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import load_data
from mtcl_torchrec.training.sharding import ranks

NAN = float("nan")


def logit(p):
    return math.log(p / (1 - p))


# ---------------------------------------------------------------------- counting


def made_labels(n=40_000, seed=0):
    """click, like (rare, often missing), buy after click, a class of 5 (the last never seen), seconds; and weights."""
    draw = np.random.default_rng(seed)
    click = draw.random(n) < 0.4
    like = np.where(draw.random(n) < 0.3, np.nan, draw.random(n) < 0.01)
    buy = click & (draw.random(n) < 0.2)
    kind = np.where(click, draw.choice(4, n, p=[0.6, 0.3, 0.08, 0.02]), np.nan)
    labels = np.stack([click, like, buy, kind, draw.exponential(9.0, n)], 1).astype(np.float32)
    return torch.from_numpy(labels), torch.from_numpy(draw.exponential(3.0, (n, 5)).astype(np.float32))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"negative_rate": 0.25}, {"pos_weight": 4.0}, {"negative_rate": 0.5, "pos_weight": 3.0}],
    ids=["plain", "negative_rate", "pos_weight", "both"],
)
def test_the_start_is_where_the_loss_of_a_constant_is_least(options, weighted):
    """Counted apart from the loss, with all that it does to a row: its gradient vanishes there."""
    tasks = [
        Task.binary("click"),
        Task.binary("like", **options),
        Task.binary("buy", after="click"),
        Task.multiclass("kind", num_classes=5),
        Task.regression("seconds", mean=9.0, std=9.0),
    ]
    labels, weights = made_labels()
    if weighted:  # the child of a chain is counted in fewer rows than its loss, which weights of its own would tell
        weights[:, 2] = weights[:, 0] = 1.0
    given = weights if weighted else None
    totals = LabelTotals(tasks)
    totals.add((labels, given))
    starts = starting_logits(tasks, totals.base_rates())
    assert set(starts) == {"click", "like", "buy", "kind"}

    def slopes(start):
        free = {name: value.clone().requires_grad_() for name, value in start.items()}
        rows = {name: value.expand(len(labels), *value.shape).squeeze(-1) for name, value in free.items()}
        rows["seconds"] = torch.zeros(len(labels))
        none = KeyedJaggedTensor(["u"], values=torch.empty(0).long(), lengths=torch.zeros(len(labels)).long())
        batch = MTBatch(torch.empty(len(labels), 0), none, labels, given)
        loss = MultiTaskLoss(tasks).eval()  # a share of the negatives weighs as much as being drawn
        loss(Chains(tasks, 1)(rows), torch.empty(len(labels), 0), batch)[0].backward()
        return {name: value.grad.abs().max().item() for name, value in free.items()}

    assert max(slopes(starts).values()) < 2e-4
    even = {name: torch.zeros_like(value) - (name == "like") * tasks[1].logit_shift for name, value in starts.items()}
    assert min(slopes(even).values()) > 0.05


def test_totals_of_parts_are_those_of_the_whole_in_whatever_order():
    labels, weights = made_labels(1000)
    tasks = [Task.binary("click"), Task.binary("like"), Task.binary("buy", after="click", chain="aitm"),
             Task.multiclass("kind", num_classes=5), Task.regression("seconds")]  # fmt: skip
    whole, merged = LabelTotals(tasks), LabelTotals(tasks)
    whole.add((labels, weights))
    for at in (slice(700, None), slice(0, 0), slice(0, 700)):
        part = LabelTotals(tasks)
        part.add((labels[at], weights[at]))
        merged.merge(part)
    for one, other in zip(whole.counts, merged.counts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    assert whole.rows.tolist() == merged.rows.tolist()
    frame = pd.DataFrame(labels.numpy(), columns=["click", "like", "buy", "kind", "seconds"])
    clicked = frame["click"] == 1
    of_buy = weights[:, 2].numpy()[clicked]
    expected = np.average(frame["click"], weights=weights[:, 0]) * np.average(frame["buy"][clicked], weights=of_buy)
    assert whole.base_rates()["buy"] == pytest.approx(expected, rel=1e-2)  # as far as the prior goes


def test_what_never_or_always_happens_starts_at_half_a_row_and_what_does_not_count_starts_nowhere():
    tasks = [Task.binary("never"), Task.binary("always"), Task.binary("unweighted"), Task.binary("missing"),
             Task.binary("after", after="missing"), Task.multiclass("kind", num_classes=3)]  # fmt: skip
    labels = torch.tensor([[0.0, 1.0, 1.0, NAN, NAN, 2.0]]).repeat(99, 1)
    for scale in (1.0, 1e-9, 1e9):  # the unit of the weights says nothing
        weights = torch.tensor([[scale, scale, 0.0, scale, scale, scale]]).repeat(99, 1)
        totals = LabelTotals(tasks)
        totals.add((labels, weights))
        rates = totals.base_rates()
        assert rates == {
            "never": pytest.approx(0.5 / 100), "always": pytest.approx(99.5 / 100),
            "kind": pytest.approx((0.5 / 100.5, 0.5 / 100.5, 99.5 / 100.5)),
        }  # fmt: skip
        assert all(torch.isfinite(start).all() for start in starting_logits(tasks, rates).values())


SCHEMA = Schema(
    features=[Feature(name="genre", group="item")],
    tasks=[
        Task.binary("click", sample_weight="trust"),
        Task.binary("buy", mask="click"),
        Task(name="taste", kind="multiclass", label="genre", item_class="genre", mask="click"),
        Task.regression("stars"),
    ],
)


def write_log(folder, parts=((0, 30), (30, 700), (700, 1000))):
    """Uneven files, of which one rank gets nearly nothing; and the frame."""
    frame = shop.log(1000)[["genre", "click", "buy", "stars"]]
    frame["trust"] = np.random.default_rng(3).exponential(2.0, len(frame))
    folder.mkdir(exist_ok=True)
    for number, (start, stop) in enumerate(parts):
        frame[start:stop].to_parquet(folder / f"{number}.parquet", index=False, row_group_size=100)
    return frame


def totals_on_a_rank(folder):
    with ranks("cpu"):
        files = ParquetFiles.open([folder], window_rows=100)
        encoder = FeatureEncoder(SCHEMA).fit_stream(files)
        source = files.only(SCHEMA.label_columns())
        try:
            totals = stream_totals(source, encoder.resolved_tasks(), encoder.labels, workers=2)
        except DataError as error:
            return dist.get_rank(), str(error)
        return [counts.tolist() for counts in totals.counts], totals.rows.tolist(), totals.base_rates()


def test_two_ranks_count_a_stream_in_parts_and_both_get_what_one_does(tmp_path):
    frame = write_log(tmp_path / "log")
    one = totals_on_a_rank(str(tmp_path / "log"))
    two = run_ranks(totals_on_a_rank, 2, str(tmp_path / "log"))
    assert two[0] == two[1]  # to the last bit
    assert two[0][1] == one[1]
    for mine, theirs in zip(two[0][0], one[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    clicked = frame["click"] == 1
    assert one[0][0] == pytest.approx([frame.trust[~clicked].sum(), frame.trust[clicked].sum()], rel=1e-6)
    assert one[0][1] == frame.buy[clicked].value_counts().sort_index().tolist()
    assert sorted(one[0][2][1:]) == sorted(frame.genre[clicked].value_counts().tolist())
    assert one[0][2][0] == 0  # unknown is no label


def test_a_weight_that_is_none_is_told_by_all_ranks(tmp_path):
    frame = write_log(tmp_path / "log")
    frame.loc[50, "trust"] = -1.0
    frame[30:700].to_parquet(tmp_path / "log/1.parquet", index=False, row_group_size=100)
    # Not wrong for what learns vocabularies, which reads no weights.
    (_, first), (_, second) = run_ranks(totals_on_a_rank, 2, str(tmp_path / "log"))
    assert first == second
    assert "1.parquet, row 20: trust = -1" in first


def test_a_long_stream_is_sampled_in_windows_that_lie_evenly():
    class Windows:
        """100 windows of 10 rows, whose event happens in the second half."""

        def __init__(self):
            self.started = []

        def windows(self, seed=None):
            return [WorldWindow(start, 10) for start in range(0, 1000, 10)]

        def read(self, window):
            self.started.append(window.start)
            return Rows(pd.DataFrame({"y": np.full(10, float(window.start >= 500))}))

    source = Windows()
    totals = stream_totals(
        source, [Task.binary("y")], lambda rows: (torch.tensor(rows.frame[["y"]].to_numpy()), None), sample_rows=95
    )
    assert source.started == list(range(0, 1000, 100))
    assert totals.counts[0].tolist() == [50.0, 50.0]


# ---------------------------------------------------------------------- models


RATES = {"click": 0.3, "like": 0.004, "liked": 0.02, "buy": 0.06, "again": 0.1, "kind": (0.7, 0.25, 0.04, 0.01)}


def untrained(base_rates, seed=0):
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=500, embedding_dim=16, feature_names=[name])
        for name in ("user", "item")
    ]
    tasks = [
        Task.binary("click"),
        Task.binary("like", negative_rate=0.1, pos_weight=2.0),
        Task.binary("liked", head="dot"),
        Task.binary("buy", after="click", chain="escm2_dr"),
        Task.binary("again", after="click", chain="aitm"),
        Task.multiclass("kind", num_classes=4),
        Task.regression("seconds", mean=40.0, std=10.0),
    ]
    groups = {"user": ["user"], "item": ["item"]}
    return MTCL(EmbeddingBagCollection(tables=tables), 0, SharedBottom([32, 16]), tasks, feature_groups=groups,
                tower_layers=[16], base_rates=base_rates).eval()  # fmt: skip


def mean_predictions(model, rows=2000):
    draw = torch.Generator().manual_seed(1)
    values, lengths = torch.randint(500, (2 * rows,), generator=draw), torch.ones(2 * rows, dtype=torch.int64)
    ids = KeyedJaggedTensor(["user", "item"], values=values, lengths=lengths)
    with torch.no_grad():
        return {name: value.mean(0) for name, value in model(torch.empty(rows, 0), ids).items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_model_predicts_the_base_rates_on_average(seed):
    found, without = mean_predictions(untrained(RATES, seed)), mean_predictions(untrained(None, seed))
    rates = {name: torch.tensor(rate) for name, rate in {**RATES, "buy|click": 0.06 / 0.3}.items()}
    for name, rate in rates.items():  # as far as random weights before the bias let it
        torch.testing.assert_close(torch.logit(found[name]), torch.logit(rate), rtol=0, atol=0.6)
    for name in ("like", "liked", "buy", "again", "kind"):
        assert (torch.logit(without[name]) - torch.logit(rates[name])).abs().max() > 1
    assert found["seconds"].item() == pytest.approx(without["seconds"].item())


def test_only_biases_differ_and_the_imputing_head_starts_with_the_one_that_it_imputes():
    before, after = (dict(untrained(rates).named_parameters()) for rates in (None, RATES))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    heads = {f"tower.heads.{i}.bias" for i in (0, 1, 3, 4, 5)}
    assert moved == heads | {"tower.dot_heads.2.bias", "tower.chains.imputing.3.bias"}
    assert after["tower.chains.imputing.3.bias"].item() == after["tower.heads.3.bias"].item()
    assert after["tower.heads.3.bias"].item() == pytest.approx(logit(0.2))
    assert after["tower.heads.4.bias"].item() == pytest.approx(logit(0.1))  # aitm predicts the event itself


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"clik": 0.4}, "base_rates: no task 'clik' (did you mean 'click'?)"),
        ({"click": 0.0}, "base_rates: 'click': a rate lies between 0 and 1, and 0 does not"),
        ({"click": 44}, "base_rates: 'click': a rate lies between 0 and 1, and 44 does not"),
        ({"click": NAN}, "base_rates: 'click': a rate lies between 0 and 1, and nan does not"),
        ({"click": [0.5, 0.5]}, "base_rates: 'click' needs 1 rate, not 2"),
        ({"kind": 0.5}, "base_rates: 'kind' needs 4 rates, not 1"),
        ({"kind": [0.5, 0.2, 0.2, 0.0]}, "base_rates: 'kind': a rate lies between 0 and 1, and 0 does not"),
        ({"kind": [0.5, 0.2, 0.2, 0.2]}, "base_rates: 'kind': the shares of its classes add up to 1.1, not to 1"),
        ({"seconds": 0.5}, "base_rates: 'seconds' is a regression task: it starts at its label's mean"),
        ({"buy": 0.1}, "base_rates: 'buy' comes after 'click', whose rate is needed, too"),
        (
            {"buy": 0.4, "click": 0.4},
            "base_rates: 'buy' (0.4) cannot happen without 'click' (0.4), so its rate is the lower one",
        ),
    ],
)
def test_rates_that_do_not_fit_are_one_clear_line(rates, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        untrained(rates)


# ---------------------------------------------------------------------- runs


STILL = {"lr: 0.1}": "lr: 1.0e-12}", "lr: 0.01}": "lr: 1.0e-12}", "epochs: 4": "epochs: 1"}


def still(text, **more):
    """A run that trains and does not move."""
    for before, after in {**STILL, **more}.items():
        text = text.replace(before, after)
    return text


def train(run, folder, existing="refuse", data=None):
    train_run(run, folder, existing=existing, device="cpu", console=Console(file=io.StringIO()), data=data)
    tensors = state_of(folder)[0]
    return {i: tensors[f"weights.model.tower.heads.{i}.bias"] for i in range(len(run.data_schema.tasks))}


def train_on_a_rank(run, folder):
    return {i: bias.tolist() for i, bias in train(parse_run(run), folder).items()}


def expected_starts(frame):
    """What the heads of the shop's click, buy (where clicked) and taste (likewise; row 0 is unknown) start at."""
    clicked, n = frame["click"] == 1, len(frame)
    bought = frame["buy"][clicked]
    shares = frame["genre"][clicked].value_counts().sort_index().to_numpy()
    return [
        logit((clicked.sum() + 0.5) / (n + 1)),
        logit((bought.sum() + 0.5) / (len(bought) + 1)),
        np.log(np.r_[0.5, shares + 0.5] / (clicked.sum() + 2.5)),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log(600).to_parquet(folder / "log.parquet", index=False)
    (folder / "train").mkdir()
    for number, at in enumerate((slice(0, 50), slice(50, 450))):
        shop.log(600)[at].to_parquet(folder / f"train/{number}.parquet", index=False, row_group_size=60)
    shop.log(600)[450:].to_parquet(folder / "val.parquet", index=False)
    return folder


def test_a_run_starts_there_and_so_does_a_task_alone(data, tmp_path):
    run = parse_run(still(shop.RUN), folder=data)
    splits = read_splits(run.data, ["time", "click", "buy", "genre"], "time")
    expected = expected_starts(splits["train"].frame)
    with ranks("cpu") as where:
        loaded = load_data(run, where, say=lambda line: None)
    biases = train(run, tmp_path / "run", data=loaded)
    for i, wanted in enumerate(expected):
        # The classes are in the order in which the vocabulary has them.
        np.testing.assert_allclose(np.sort(biases[i]), np.sort(np.atleast_1d(wanted)), atol=1e-5)
    assert abs(biases[3].item()) < 0.5  # a regression starts at the mean
    alone = train(single_task(run, run.data_schema.tasks[1]), tmp_path / "alone")
    torch.testing.assert_close(alone[0], biases[1])


def test_a_streamed_run_on_two_ranks_starts_there_too(data, tmp_path):
    text = still(shop.RUN).replace(
        "{log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}",
        "{train: train, val: val.parquet, stream: true, window: 100}",
    )
    text = text.replace("statistics:\n  keys: [user_id, [user_id, genre]]\n  outcomes: [click]\n", "")
    run = dump_run(parse_run(text, folder=data))
    one, other = run_ranks(train_on_a_rank, 2, run, tmp_path / "run")
    assert one == other
    for i, wanted in enumerate(expected_starts(shop.log(600)[:450])):
        np.testing.assert_allclose(np.sort(one[i]), np.sort(np.atleast_1d(wanted)), atol=1e-5)


def test_a_run_that_goes_on_keeps_its_heads_and_a_new_class_starts_at_its_share(data, tmp_path):
    run = parse_run(still(shop.RUN), folder=tmp_path)
    shop.log(600).to_parquet(tmp_path / "log.parquet", index=False)
    before = train(run, tmp_path / "run")
    newer = shop.log(600, seed=9)
    newer["click"] = 1  # far from what it was
    newer.loc[newer["genre"] == "drama", "genre"] = "zoology"
    newer.to_parquet(tmp_path / "log.parquet", index=False)
    run.training.epochs = 2
    after = train(run, tmp_path / "run", "resume")
    for i in (0, 1, 3):
        torch.testing.assert_close(after[i], before[i])
    torch.testing.assert_close(after[2][:-1], before[2])
    train_rows = read_splits(run.data, ["time", "genre"], "time")["train"].frame
    share = ((train_rows["genre"] == "zoology").sum() + 0.5) / (len(train_rows) + 3)
    assert after[2][-1].item() == pytest.approx(math.log(share), abs=1e-5)


def test_a_run_on_a_world_starts_at_the_rates_of_its_first_rows(tmp_path):
    run = parse_run(world_run("shop", rows=2000, val_rows=200, test_rows=0, num_users=200, num_items=100))
    run.optimizers.tables.lr = run.optimizers.dense.lr = 1e-12
    run.training.epochs = 1
    biases = train(run, tmp_path / "run")
    frame = world_of(run.data.synthetic).rows(np.arange(2000))
    for i, task in enumerate(run.data_schema.tasks):
        if task.kind == "binary" and task.after is None and task.mask is None:
            label = frame[task.label_column].dropna()
            assert biases[i].item() == pytest.approx(logit((label.sum() + 0.5) / (len(label) + 1)), abs=1e-5)
