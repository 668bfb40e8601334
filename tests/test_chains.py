"""Chains of events: what is declared, what is lost, what is learnt, on one rank and on two."""

import gc
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pydantic
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from mtcl_torchrec import MTCL, Chain, DataError, Feature, MMoE, MTCLTrain, Schema, SharedBottom, Task, WeightedMean
from mtcl_torchrec.config import OptimizersConfig, TableOptimizerConfig, dump_run, parse_run
from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.source import Rows, read_rows, split_by_time
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.report import evaluate_predictions, print_evaluation
from mtcl_torchrec.modules.chains import (
    Chains,
    InformationTransfer,
    conditional_risk,
    event_logit,
    fill_known_zeros,
    imputed_name,
)
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.schema import ConfigError, chain_links
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.judging import fused_tasks, rows_predicted_by
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

NAN = float("nan")
KINDS = ["esmm", "escm2_ips", "escm2_dr", "aitm"]
CLICK = Task.binary("click")


def buy(chain="esmm", **options):
    return Task.binary("buy", after="click", chain=chain, **options)


# ---------------------------------------------------------------------- declared


def test_after_alone_is_esmm_and_a_chain_has_options():
    plain, ips = Task.binary("buy", after="click"), buy({"kind": "escm2_ips", "self_normalised": True})
    assert (plain.chain.kind, plain.conditional_name) == ("esmm", "buy|click")
    assert (ips.chain.kind, ips.chain.self_normalised, ips.chain.min_propensity) == ("escm2_ips", True, 0.05)
    assert buy(Chain(kind="aitm")).conditional_name is None
    assert CLICK.conditional_name is None
    assert chain_links([CLICK, Task.binary("like"), plain]) == [(2, 0)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: buy("esm"), "task 'buy': no chain 'esm' (did you mean 'esmm'?); there are esmm, escm2_ips, escm2_dr"),
        (lambda: buy({"kind": "escm2"}), "task 'buy': no chain 'escm2' (did you mean 'escm2_"),
        (lambda: buy({"kind": "esmm", "min_propensity": 0.1}), "task 'buy': chain.min_propensity belongs to escm2_ips"),
        (lambda: buy({"kind": "escm2_dr", "self_normalised": True}), "belongs to escm2_ips, not to escm2_dr"),
        (lambda: buy({"kind": "escm2_ips", "calibrator_weight": 1}), "belongs to aitm, not to escm2_ips"),
        (lambda: buy({"kind": "escm2_ips", "min_propensity": 0}), "greater than 0"),
        (lambda: buy({"kind": "escm2_ips", "joint_weight": 0, "conditional_weight": 0}), "nothing trains it"),
        (lambda: Task.binary("buy", chain="esmm"), "task 'buy': chain needs after"),
        (lambda: Task.binary("buy", after="buy"), "task 'buy': after: a task cannot come after itself"),
        (lambda: Task.regression("price", after="click"), "task 'price': after belongs to binary tasks"),
    ],
)
def test_a_task_refuses_a_chain_that_does_not_fit(make, said):
    with pytest.raises(pydantic.ValidationError) as caught:
        make()
    assert said in str(caught.value)


LINKS = [
    ([CLICK, Task.binary("buy", after="clik")], "task 'buy': after: no task 'clik' (did you mean 'click'?)"),
    (
        [Task.regression("price"), Task.binary("buy", after="price")],
        "after: 'price' is a regression task, not a binary",
    ),
    (
        [CLICK, Task.binary("a", after="b"), Task.binary("b", after="c"), Task.binary("c", after="a")],
        "after: the tasks 'a', 'b', 'c' come after each other in a circle",
    ),
    (
        [CLICK, buy(mask="click")],
        "task 'buy': mask 'click' would hide rows that it learns from after 'click'; leave mask",
    ),
    ([CLICK, buy(), Task.binary("buy|click")], "task 'buy|click': the conditional prediction of 'buy' is called so"),
]


@pytest.mark.parametrize(("tasks", "said"), LINKS)
def test_schema_and_model_refuse_the_same_links(tasks, said):
    with pytest.raises(pydantic.ValidationError) as caught:
        Schema(features=[Feature(name="u", group="user")], tasks=tasks)
    assert said in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(said)):
        model(tasks)


def test_yaml_says_the_same_and_is_written_back():
    text = """
    data: {log: x.parquet}
    schema:
      time: t
      features: [{name: u, group: user}]
      tasks:
        - {name: buy, kind: binary, after: click, chain: CHAIN}
        - {name: click, kind: binary}
    """
    run = parse_run(text.replace("CHAIN", "{kind: escm2_dr, conditional_weight: 0.5}"))
    assert run.data_schema.tasks[0].chain == Chain(kind="escm2_dr", conditional_weight=0.5)
    assert parse_run(dump_run(run)) == run
    assert parse_run(text.replace("CHAIN", "aitm")).data_schema.tasks[0].chain.kind == "aitm"
    with pytest.raises(ConfigError, match=r"tasks.0.chain: task 'buy': no chain 'atim' \(did you mean 'aitm'\?\)"):
        parse_run(text.replace("CHAIN", "atim"))
    with pytest.raises(ConfigError, match=r"unknown key .*chain.min_propensty' \(did you mean 'min_propensity'\?\)"):
        parse_run(text.replace("CHAIN", "{kind: escm2_ips, min_propensty: 0.1}"))


# ---------------------------------------------------------------------- labels


def test_a_label_that_could_not_be_one_is_zero_in_chains_of_any_order():
    links = chain_links([Task.binary("buy", after="cart"), Task.binary("cart", after="click"), CLICK])
    labels = torch.tensor([[NAN, NAN, 0.0], [NAN, 0.0, 1.0], [NAN, NAN, 1.0], [NAN, NAN, NAN], [1.0, NAN, NAN]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [NAN, NAN, 1.0], [NAN, NAN, NAN], [1.0, NAN, NAN]])
    torch.testing.assert_close(fill_known_zeros(links, labels), expected, equal_nan=True)
    hidden = torch.ones(5, 3, dtype=torch.bool)
    hidden[0, 2] = hidden[1, 0] = False  # a parent that is masked out is not known
    filled = fill_known_zeros(links, labels, hidden)
    torch.testing.assert_close(filled[0], labels[0], equal_nan=True)
    assert filled[1, 0] == 0  # the mask of the label itself is the loss's business


def encode(frame, tasks, **kwargs):
    encoder = FeatureEncoder(Schema(features=[Feature(name="u", group="user")], tasks=tasks))
    rows = Rows(pd.DataFrame({"u": "x", **frame}))
    return encoder.fit(rows).encode(rows).labels


def test_encoding_fills_the_zeros_and_refuses_an_event_without_the_one_before():
    tasks = [Task.binary("sold", label="buy", after="cart"), Task.binary("cart", after="click", mask="seen"), CLICK]
    good = {
        "click": [0, 1, 1, None, 0],
        "cart": [None, 1, 0, None, 1],
        "buy": [None, 1, None, None, None],
        "seen": [0, 1, 1, 1, 0],
    }
    labels = encode(good, tasks)
    expected = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1], [NAN, NAN, NAN], [0, 0, 0]])
    torch.testing.assert_close(labels, expected, equal_nan=True)
    with pytest.raises(DataError, match="row 4: cart = 1 and click = 0; task 'cart' comes after 'click' and cannot"):
        encode({**good, "seen": 1}, tasks)
    with pytest.raises(DataError, match="row 0: buy = 1 and click = 0; task 'sold' comes after 'click'"):
        encode({**good, "buy": [1, 1, None, None, None]}, tasks)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("size", [3.0, 50.0, 1e4])
def test_the_loss_of_a_product_neither_overflows_nor_loses_its_gradient(size):
    """Against float64, in which 1 - pq = σ(-a) + σ(a) σ(-b) and log σ(x) are exact enough."""
    grid = [-size, -size / 2, 0.0, size / 2, size]
    for a, b, y in itertools.product(grid, grid, [0.0, 1.0]):
        one = torch.tensor([a, b], requires_grad=True)
        loss = F.binary_cross_entropy_with_logits(event_logit(one[:1], one[1:]), torch.tensor([y]))
        loss.backward()
        two = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
        log_p = F.logsigmoid(two).sum()
        log_not = torch.logaddexp(F.logsigmoid(-two[0]), F.logsigmoid(two[0]) + F.logsigmoid(-two[1]))
        expected = -(y * log_p + (1 - y) * log_not)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        rounding = 2 * size * torch.finfo(torch.float32).eps  # of the exponents
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=rounding, atol=1e-6)


def problem(rows=40, seed=0):
    """Labels with gaps, weights, a mask, and logits of the heads for click, buy and keep (and imputed ones)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (rows, 3), generator=g).float().cumprod(1)
    gone = torch.rand(rows, 3, generator=g) < 0.25
    labels = torch.where(gone, NAN, labels)
    mask = torch.rand(rows, 3, generator=g) < 0.85
    weights = torch.rand(rows, 3, generator=g) + 0.5
    return SimpleNamespace(labels=labels, weights=weights, mask=mask), torch.randn(4, rows, generator=g) * 1.5


def reference(task, options, logits, batch):
    """Loss of buy (after click) from the papers' equations with probabilities, in float64, row by row."""
    click, conversion, imputed = logits
    numerator = denominator = second = second_count = 0.0
    for i in range(len(click)):
        o, y = (batch.labels[i, t].item() if batch.mask[i, t] else NAN for t in (0, 1))
        v = batch.weights[i, 1].item()
        if np.isnan(y) and o == 0 and batch.mask[i, 1]:
            y = 0.0
        if np.isnan(y):
            continue
        p, q = torch.sigmoid(click[i]), torch.sigmoid(conversion[i])
        product = q if task == "aitm" else p * q
        numerator = numerator - v * (y * product.log() + (1 - y) * (1 - product).log())
        denominator += v
        if task == "aitm":
            numerator = numerator + v * options.get("calibrator_weight", 0.6) * torch.clamp(q - p, min=0)
        if task in ("escm2_ips", "escm2_dr"):
            weight = (o == 1) / max(p.item(), options.get("min_propensity", 0.05))
            e = -(y * q.log() + (1 - y) * (1 - q).log())
            if task == "escm2_ips":
                second = second + v * weight * e
                second_count += v * (weight if options.get("self_normalised") else 1.0)
            else:
                r, still, fixed = torch.sigmoid(imputed[i]), torch.sigmoid(imputed[i]).detach(), q.detach()
                guess = -(still * q.log() + (1 - still) * (1 - q).log())
                learnt = -(r * fixed.log() + (1 - r) * (1 - fixed).log())
                square = (e.detach() - learnt) ** 2
                second = second + v * (guess + weight * (e - guess + options.get("imputation_weight", 1) * square))
                second_count += v
    loss = numerator / denominator
    if second_count:
        loss = options.get("joint_weight", 1.0) * loss + options.get("conditional_weight", 0.1) * second / second_count
    return loss


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("esmm", {}),
        ("aitm", {}),
        ("aitm", {"calibrator_weight": 2.5}),
        ("escm2_ips", {}),
        ("escm2_ips", {"joint_weight": 0.3, "conditional_weight": 0.9, "min_propensity": 0.4}),
        ("escm2_ips", {"conditional_weight": 1.0, "self_normalised": True}),
        ("escm2_dr", {}),
        ("escm2_dr", {"conditional_weight": 1.0, "imputation_weight": 0.5, "min_propensity": 0.3}),
    ],
)
def test_losses_and_gradients_are_those_of_the_papers(kind, options):
    batch, raw = problem()
    batch = SimpleNamespace(**{name: getattr(batch, name)[:, :2] for name in ("labels", "weights", "mask")})
    tasks = [CLICK, buy({"kind": kind, **options})]
    heads = [logit.clone().requires_grad_() for logit in raw[:3]]
    logits = {"click": heads[0], "buy": heads[1]}
    if kind == "escm2_dr":
        logits[imputed_name(tasks[1])] = heads[2]
    module = MultiTaskLoss(tasks)
    loss, (_, _, labels) = module(Chains(tasks, 1)(logits), torch.zeros(40, 1), batch)
    exact = [logit.double().clone().requires_grad_() for logit in raw[:3]]
    expected = reference(kind, options, exact, batch)
    torch.testing.assert_close(module.last_task_losses[1].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    known = ~torch.isnan(batch.labels[:, 0]) & batch.mask[:, 0]
    of_click = F.binary_cross_entropy_with_logits(exact[0][known], batch.labels[known, 0].double(), reduction="none")
    expected = expected + (of_click * batch.weights[known, 0]).sum() / batch.weights[known, 0].sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for mine, theirs in zip(heads, exact, strict=True):
        wanted = None if theirs.grad is None else theirs.grad.float()
        torch.testing.assert_close(mine.grad, wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(labels, fill_known_zeros([(1, 0)], batch.labels, batch.mask), equal_nan=True)


def test_three_stages_multiply_and_every_stage_is_trained_by_the_last():
    batch, raw = problem()
    tasks = [CLICK, buy(), Task.binary("keep", after="buy")]
    heads = [logit.clone().requires_grad_() for logit in raw[:3]]
    out = Chains(tasks, 1)({task.name: logit for task, logit in zip(tasks, heads, strict=True)})
    p = torch.sigmoid(raw[:3].double())
    torch.testing.assert_close(torch.sigmoid(out["keep"]).double(), p.prod(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out["keep|buy"], heads[2])
    loss = MultiTaskLoss([t.model_copy(update={"weight": float(t.name == "keep")}) for t in tasks])
    value, _ = loss(out, torch.zeros(40, 1), batch)
    value.backward()
    y = fill_known_zeros([(1, 0), (2, 1)], batch.labels, batch.mask)[:, 2]
    known = ~torch.isnan(y) & batch.mask[:, 2]
    rows = F.binary_cross_entropy(p.prod(0)[known], y[known].double(), reduction="none")
    weights = batch.weights[known, 2].double()
    torch.testing.assert_close(value.double(), (weights * rows).sum() / weights.sum(), rtol=1e-5, atol=1e-6)
    assert all(head.grad.count_nonzero() > 20 for head in heads)


def test_a_parent_may_be_of_another_kind():
    tasks = [CLICK, buy("aitm"), Task.binary("keep", after="buy", chain="escm2_ips")]
    raw = torch.randn(3, 5)
    out = Chains(tasks, 1)({t.name: logit for t, logit in zip(tasks, raw, strict=True)})
    torch.testing.assert_close(out["buy"], raw[1])
    torch.testing.assert_close(torch.sigmoid(out["keep"]), torch.sigmoid(raw[1]) * torch.sigmoid(raw[2]))
    _, counts = conditional_risk(tasks[2], out, torch.ones(5), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(counts, torch.ones(5))


def test_information_transfer_is_attention_over_the_parents_word_and_ones_own():
    torch.manual_seed(0)
    module, parent, own = InformationTransfer(6).double(), torch.randn(2, 6).double(), torch.randn(2, 6).double()
    for b in range(2):
        told = F.silu(module.tell.weight @ parent[b] + module.tell.bias)
        scores, values = [], []
        for u in (told, own[b]):
            query, key = (h.weight @ u + h.bias for h in (module.query, module.key))
            scores.append((query @ key / 6**0.5).item())
            values.append(module.value.weight @ u + module.value.bias)
        w = np.exp(scores) / np.exp(scores).sum()
        torch.testing.assert_close(module(parent, own)[b], w[0] * values[0] + w[1] * values[1])


def test_in_aitm_the_first_tower_tells_the_last_through_the_middle_one():
    tasks = [Task.binary("keep", after="buy", chain="aitm"), CLICK, buy("aitm")]
    torch.manual_seed(0)
    chains, h = Chains(tasks, 4), torch.randn(3, 5, 4, requires_grad=True)
    out = chains.transfer(h)
    torch.testing.assert_close(out[1], h[1])
    torch.testing.assert_close(out[0], chains.transfers["0"](out[2], h[0]))
    out[0].sum().backward()
    assert all(h.grad[t].any() for t in range(3))


def test_a_part_that_is_not_finite_is_named():
    batch, raw = problem()
    tasks = [CLICK, buy("escm2_ips"), Task.binary("keep", after="buy")]
    module = MultiTaskLoss(tasks)
    logits = Chains(tasks, 1)({t.name: logit.clone() for t, logit in zip(tasks, raw, strict=False)})
    lost = (batch.labels[:, 0] == 1) & (batch.labels[:, 1] == 0) & batch.mask[:, :2].all(1)
    at = int(lost.nonzero()[0])
    logits["buy|click"][at] = 3e38
    batch.weights[at, 1] = 10.0
    module(logits, torch.zeros(40, 1), batch)
    assert module.skipped().last_parts == ("buy|click",)
    assert module.found_inf == 1


# ---------------------------------------------------------------------- unbiased


def expected_risk(chain, q, *, propensities, imputed=None):
    """Mean over all outcomes of a world whose 8 places are clicked with p and sold with r: each outcome is a row, and
    its probability the row's weight."""
    p, r = torch.linspace(0.05, 0.9, 8), torch.linspace(0.1, 0.7, 8)
    outcomes = [(x, o, y) for x in range(8) for o in (0, 1) for y in ((0, 1) if o else (NAN,))]
    chance = [(p[x] * (r[x] if y else 1 - r[x]) if o else 1 - p[x]) / 8 for x, o, y in outcomes]
    place = torch.tensor([x for x, _, _ in outcomes])
    task = buy({"kind": chain, "min_propensity": 1e-3, "conditional_weight": 1, "joint_weight": 0})
    logits = {"click": torch.logit(propensities(p))[place], "buy": q[place], "buy|click": q[place]}
    if imputed is not None:
        logits[imputed_name(task)] = torch.logit(imputed(r))[place]
    loss = MultiTaskLoss([CLICK.model_copy(update={"weight": 0.0}), task])
    labels = torch.tensor([[o, y] for _, o, y in outcomes])
    weights = torch.tensor([[1.0, c] for c in chance])
    return loss(logits, torch.zeros(len(place), 1), SimpleNamespace(labels=labels, weights=weights))[0]


def right(x):
    return x


def wrong(x):
    return 0.2 + 0.3 * x


@pytest.mark.parametrize(
    ("chain", "propensities", "imputed", "unbiased"),
    [
        ("escm2_ips", right, None, True),
        ("escm2_ips", wrong, None, False),
        ("escm2_dr", right, wrong, True),
        ("escm2_dr", wrong, right, True),
        ("escm2_dr", wrong, wrong, False),
    ],
)
def test_weighted_risks_have_their_minimum_at_the_truth_over_the_whole_space(chain, propensities, imputed, unbiased):
    p, r = torch.linspace(0.05, 0.9, 8), torch.linspace(0.1, 0.7, 8)
    # A model that can say one number only: the best is the mean over the whole space, not that among clicks.
    whole, among_clicks = r.mean(), (p * r).sum() / p.sum()
    assert among_clicks > whole + 0.1
    constant = torch.logit(whole).requires_grad_()
    expected_risk(chain, constant.expand(8), propensities=propensities, imputed=imputed).backward()
    assert (abs(constant.grad) < 1e-6) == unbiased
    if unbiased:  # and one that can say eight is right about each
        each = torch.logit(r).requires_grad_()
        expected_risk(chain, each, propensities=propensities, imputed=imputed).backward()
        torch.testing.assert_close(each.grad, torch.zeros(8), atol=1e-6, rtol=0)


SEGMENTS, EACH = 200, 30


def world():
    """Segments, half of them seldom clicked and then seldom sold: (segment, click, sold if clicked, its chance)."""
    g = torch.Generator().manual_seed(1)
    segment = torch.arange(SEGMENTS).repeat_interleave(EACH)
    warm = segment % 2 == 0
    p, r = torch.where(warm, 0.6, 0.03), torch.where(warm, 0.6, 0.1)
    click = (torch.rand(len(p), generator=g) < p).float()
    return segment, click, (torch.rand(len(p), generator=g) < r).float(), r


def model(tasks, rows=SEGMENTS, fused=None, **options):
    table = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=8, feature_names=["segment"])
    return MTCL(
        EmbeddingBagCollection(tables=[table]), 0, SharedBottom([16]), tasks, fused, tower_layers=[8], **options
    )


def mean_conversion(tasks):
    """What a model learns to be the mean chance of a sale over all rows, if all were clicked."""
    segment, click, sold, _ = world()
    labels = {"click": click, "buy": torch.where(click == 1, sold, NAN)}
    torch.manual_seed(0)
    train = MTCLTrain(model(tasks))
    optimizer = torch.optim.Adam(train.parameters(), lr=0.02)
    ids = KeyedJaggedTensor(["segment"], values=segment, lengths=torch.ones_like(segment))
    batch = Batch(torch.empty(len(segment), 0), ids, torch.stack([labels[t.name] for t in tasks], 1))
    for _ in range(60):
        optimizer.zero_grad()
        train(batch)[0].backward()
        optimizer.step()
    out = train.model.eval()(batch.dense_features, ids)
    return out.get("buy|click", out["buy"]).mean().item()


def test_over_the_whole_space_every_kind_is_nearer_to_the_truth_than_clicks_alone():
    truth = world()[3].mean().item()
    naive = mean_conversion([Task.binary("buy")]) - truth
    assert naive > 0.1
    for kind in ("esmm", "escm2_ips", "escm2_dr"):
        options = {} if kind == "esmm" else {"conditional_weight": 1.0}
        assert abs(mean_conversion([CLICK, buy({"kind": kind, **options})]) - truth) < 0.5 * naive, kind


# ---------------------------------------------------------------------- the model


def test_predictions_are_those_of_the_event_everywhere():
    tasks = [
        CLICK,
        buy(),
        Task.binary("keep", after="buy", chain="escm2_dr"),
        buy("aitm", label="buy").model_copy(update={"name": "sale"}),
    ]
    torch.manual_seed(0)
    whole = model(tasks, fused=WeightedMean({"keep": 1.0, "buy": 1.0}))
    ids = KeyedJaggedTensor(["segment"], values=torch.arange(9), lengths=torch.ones(9, dtype=torch.int64))
    out = whole(torch.empty(9, 0), ids)
    assert list(out) == ["click", "buy", "keep", "sale", "buy|click", "keep|buy", "score"]
    torch.testing.assert_close(out["buy"], out["click"] * out["buy|click"])
    torch.testing.assert_close(out["keep"], out["buy"] * out["keep|buy"])
    torch.testing.assert_close(out["score"], (out["buy"] + out["keep"]) / 2)
    assert all(((v >= 0) & (v <= 1)).all() for v in out.values())
    # What training hands to metrics means the same.
    _, (_, logits, labels) = MTCLTrain(whole)(Batch(torch.empty(9, 0), ids, torch.tensor([[0.0, NAN, NAN, NAN]] * 9)))
    torch.testing.assert_close(torch.sigmoid(logits["keep"]), out["keep"])
    assert labels.tolist() == [[0.0] * 4] * 9


def test_without_a_chain_nothing_is_added():
    tasks = [CLICK, Task.binary("buy")]
    assert not list(Chains(tasks, 4).parameters())
    assert "chains" not in str(list(model(tasks).state_dict()))


def test_in_bf16_products_are_formed_in_single_precision():
    torch.manual_seed(0)
    whole = model([CLICK, buy("aitm"), Task.binary("keep", after="buy")], precision="bf16")
    ids = KeyedJaggedTensor(["segment"], values=torch.arange(9), lengths=torch.ones(9, dtype=torch.int64))
    out = whole(torch.empty(9, 0), ids)
    assert all(v.dtype == torch.float32 for v in out.values())
    torch.testing.assert_close(out["keep"], out["buy"] * out["keep|buy"])


def test_the_conditional_prediction_is_judged_where_the_parent_happened(capsys):
    labels = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [NAN, 0.0]])
    predictions = {"click": np.array([0.8, 0.8, 0.1, 0.5]), "buy": np.array([0.4, 0.1, 0.0, 0.2])}
    predictions["buy|click"] = np.array([0.5, 0.3, 0.9, 0.9])
    found = evaluate_predictions((CLICK, buy()), predictions, labels, None, {}, ["buy"])
    assert {name: m["count"] for name, m in found.tasks.items()} == {"click": 3, "buy": 4, "buy|click": 2}
    assert found.tasks["buy|click"]["auc"] == 1
    assert found.tasks["buy|click"]["calibration"] == pytest.approx(0.8)
    print_evaluation(found, "test", Console(width=100))
    assert "buy|click" in capsys.readouterr().out


# ---------------------------------------------------------------------- ranks


CHAINED = """
    - {name: buy, kind: binary, after: click}
    - {name: keep, kind: binary, after: buy, chain: esmm}
    - {name: ips, kind: binary, label: buy, after: click, chain: {kind: escm2_ips, conditional_weight: 1}}
    - {name: norm, kind: binary, label: buy, after: click, chain: {kind: escm2_ips, self_normalised: true}}
    - {name: dr, kind: binary, label: buy, after: click, chain: {kind: escm2_dr, min_propensity: 0.1}}
    - {name: told, kind: binary, label: buy, after: click, chain: aitm}
    - {name: last, kind: binary, label: keep, after: told, chain: {kind: aitm, calibrator_weight: 1}}
    - {name: click, kind: binary}
"""


def shop_run(folder, batch_size):
    before, _, rest = shop.RUN.partition("    - {name: click, kind: binary}\n")
    text = before + CHAINED.lstrip("\n") + rest[rest.index("statistics:") :]
    text = text.replace("{click: 1, buy: 3, taste: 0.5, stars: 0.5}", "{click: 1, buy: 3, keep: 2, dr: 1, last: 1}")
    text = text.replace("gate_dropout: 0.1", "gate_dropout: 0.0").replace(
        "epochs: 4, batch_size: 32", "epochs: 2, batch_size: %d"
    )
    text = text.replace("lr: 0.1}", "lr: 0.2}").replace("lr: 0.01}", "lr: 0.02}")
    return parse_run(text % batch_size, folder=folder)


PYTHON_TASKS = [
    CLICK,
    *(buy({"kind": kind}).model_copy(update={"name": kind}) for kind in KINDS),
    Task.binary("keep", after="escm2_dr", chain={"kind": "escm2_ips", "self_normalised": True}),
    Task.binary("last", after="aitm", chain="aitm", weight=0.5),
]


def python_rows(rows=50):
    g = torch.Generator().manual_seed(3)
    click, sold, kept = (torch.rand(rows, generator=g) < 0.5 for _ in range(3))
    sale = torch.where(click, sold.float(), NAN)
    keep = torch.where(click & sold, kept.float(), NAN)
    keep[torch.rand(rows, generator=g) < 0.6] = NAN  # in many steps one rank has it
    labels = torch.stack([click.float(), *[sale] * 4, keep, keep], 1)
    return EncodedRows(
        torch.empty(rows, 0), ("segment",), torch.randint(0, 20, (rows, 1), generator=g), labels,
        weights=torch.rand(rows, len(PYTHON_TASKS), generator=g) + 0.5,
    )  # fmt: skip


def train_python(where):
    """The door of those who have a pipeline of their own: dense weights and losses after some steps."""
    table = EmbeddingBagConfig(name="t", num_embeddings=20, embedding_dim=8, feature_names=["segment"])
    ebc = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
    torch.manual_seed(7)
    train = MTCLTrain(MTCL(ebc, 0, MMoE(2, [8]), PYTHON_TASKS, tower_layers=[6]))
    config = OptimizersConfig(tables=TableOptimizerConfig(kind="sgd", lr=0.5))
    sharded, optimizer = parallelise(train, where, config, seed=3)
    pipe = build_pipeline(sharded, optimizer, where.device, "sparse_dist")
    sharded.train()
    data = python_rows()
    indices = global_batches(len(data), 8 // where.world_size, rank=where.rank, world_size=where.world_size)
    waiting, losses = iterate(data, indices), []
    for _ in indices:
        loss, *_ = pipe.progress(waiting)
        losses.append(np.mean(where.gather(loss.item())))
    assert train.loss.skipped().steps == 0
    weights = {n: v.detach().numpy().copy() for n, v in sharded.state_dict().items() if ".tower." in n}
    del pipe, sharded, optimizer, train
    gc.collect()
    return losses, weights


def both_doors(folder, out, batch_size):
    with ranks("cpu") as where:
        python = train_python(where)
        run = shop_run(folder, batch_size)
        result = train_run(run, out, device="cpu", console=Console(quiet=True))
        return python, result.evaluations


def test_every_kind_trains_from_yaml_and_python_and_two_ranks_are_one(tmp_path):
    log = shop.log(1200)
    log["keep"] = log["buy"] * (log["hour"] > 8)
    log["buy"] = log["buy"].where((log["click"] == 1) | (log["hour"] > 12))  # partly missing where not clicked
    log["keep"] = log["keep"].where(log["buy"] == 1)
    log.to_parquet(tmp_path / "log.parquet", index=False)
    (losses, weights), evaluations = both_doors(tmp_path, tmp_path / "one", 72)
    for (of_two, weights_of_two), evaluations_of_two in run_ranks(both_doors, 2, tmp_path, tmp_path / "two", 36):
        np.testing.assert_allclose(of_two, losses, rtol=1e-4)
        for name, value in weights.items():
            np.testing.assert_allclose(weights_of_two[name], value, atol=2e-5, err_msg=name)
        for split, evaluation in evaluations.items():
            for task, metrics in evaluation.tasks.items():
                theirs = evaluations_of_two[split].tasks[task]
                for key in ("log_loss", "ne", "calibration", "base_rate", "count"):
                    assert theirs[key] == pytest.approx(metrics[key], rel=2e-3), (task, key)
    test = evaluations["test"].tasks
    clicks = int(test["click"]["count"] * test["click"]["base_rate"] + 0.5)
    for task in ("buy", "ips", "norm", "dr"):
        assert test[task]["count"] == test["click"]["count"]  # the whole space
        assert test[f"{task}|click"]["count"] == clicks
    for task in ("buy", "ips", "norm", "dr", "told"):
        assert test[task]["auc"] > 0.6, task
    assert test["last"]["count"] == test["keep"]["count"] == test["click"]["count"]
    finished_run_is_of_one_mind(tmp_path)


def finished_run_is_of_one_mind(folder):
    """Evaluated and asked for recommendations, the stored run predicts the events."""
    run = FinishedRun.load(folder / "two")
    raw = split_by_time(read_rows([str(folder / "log.parquet")]), "time", 0.15, 0.15)["test"]
    again = evaluate_table(rows_predicted_by(run, raw), fused_tasks=fused_tasks(run.model))
    assert again.tasks["buy|click"]["auc"] > 0.5
    assert "auc keep" in again.ranking["fused"]
    ranked = Recommender(run).recommend("u3")
    assert not [column for column in ranked if "|" in column]
    assert ranked["score"].between(0, 1).all()
    for child, parent in (("buy", "click"), ("keep", "buy"), ("dr", "click")):
        assert (ranked[child] <= ranked[parent] + 1e-6).all()


def test_a_focal_loss_is_no_probability_to_reckon_with():
    focal = Task.binary("click", focal_gamma=2.0)
    with pytest.raises(ValueError, match="task 'buy': after: the chain reckons with the probability of 'click'"):
        chain_links([focal, Task.binary("buy", after="click")])
    assert chain_links([focal, Task.binary("buy", after="click", chain="aitm")]) == [(1, 0)]


@pytest.mark.parametrize("chain", ["esmm", "escm2_dr", "aitm"])
def test_a_frozen_child_moves_no_parent(chain):
    tasks = [Task.binary("click"), Task.binary("buy", after="click", chain=chain)]
    torch.manual_seed(0)
    chains, frozen = Chains(tasks, width=4), torch.tensor([False, True])
    for cut in (frozen, None):
        h = torch.randn(2, 5, 4, requires_grad=True)
        moved = chains.transfer(h, cut)
        logits = chains({"click": moved[0].sum(1), "buy": moved[1].sum(1)}, cut)
        (parents,) = torch.autograd.grad(logits["buy"].sum(), h)
        assert (parents[0] == 0).all() == (cut is not None)
        assert (parents[1] != 0).any()
