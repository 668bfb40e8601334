"""Calibration and every kind of fused score as part of a graph that `torch.export` makes: the same numbers as eager."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from mtcl_torchrec.modules.calibration import (
    Calibration,
    IsotonicCalibration,
    IsotonicValue,
    PlattScaling,
    PriorCorrection,
    TemperatureScaling,
    UnitInterval,
)
from mtcl_torchrec.modules.fusion import (
    Borda,
    ContextGatedMean,
    DenseNumber,
    ExpectedValue,
    HardVoting,
    MonotoneNetwork,
    PowerProduct,
    ReciprocalRankFusion,
    RowContext,
    SoftVoting,
    Stacking,
    TopKVoting,
    WeightedGeometricMean,
    WeightedMean,
    contributions,
    fuse,
)
from mtcl_torchrec.modules.output import FusedOutput
from mtcl_torchrec.schema import Task
from mtcl_torchrec.serving.network import _Features, told_parts

TASKS = [
    Task.binary("click"), Task.binary("buy", after="click"), Task.multiclass("genre", 4),
    Task.regression("stars").model_copy(update={"mean": 3.0, "std": 2.0}),
]  # fmt: skip
WEIGHTS = {"click": 1.0, "buy": 4.0, "genre": 0.5, "stars": -0.5}


class Own(nn.Module):
    """A score of one's own: its parts are told by the documented signature, context or not."""

    tasks = ("click", "buy")

    def forward(self, parts):
        return (parts["click"] + parts["buy"]) / 2

    def contributions(self, parts, context):
        return {name: parts[name] / 2 for name in self.tasks}


KINDS = {
    "geometric": lambda: WeightedGeometricMean(WEIGHTS),
    "product": lambda: PowerProduct({"click": 1, "stars": 2}, bases={"stars": 2}, exponents={"stars": -1}),
    "value": lambda: ExpectedValue({"click": 1, "buy": -0.1}, numbers={"buy": DenseNumber(1, 2.0, 0.5, "log")}),
    "soft": lambda: SoftVoting(WEIGHTS, thresholds={"buy": 0.2}),
    "hard": lambda: HardVoting(WEIGHTS),
    "top_k": lambda: TopKVoting(WEIGHTS, k=2),
    "top_k_soft": lambda: TopKVoting(WEIGHTS, k=2, temperature=0.1),
    "borda": lambda: Borda(WEIGHTS),
    "rank": lambda: ReciprocalRankFusion(WEIGHTS, k=5),
    "stacking": lambda: Stacking(WEIGHTS, bias=0.3),
    "monotone": lambda: MonotoneNetwork({"click": 1, "buy": 1, "stars": -1}, hidden=[6]),
    "gated": lambda: ContextGatedMean(WEIGHTS, features={"tab": 3}, dense_columns=[0], hidden=4),
    "own": Own,
}


def fitted(piece, **buffers):
    piece.fill(slice(None), fitted=True, **buffers)
    return piece


def calibration():
    """Every kind of piece; two of them by segment, with parameters of its own for one value."""
    click = PlattScaling(segment="tab", segment_rows=3)
    click.fill(slice(None), slope=0.5, intercept=-1.0)
    click.fill(2, slope=2.0, intercept=0.5)
    buy = fitted(IsotonicCalibration(3, segment="genre", segment_rows=4), x=[-2.0, 0.0, 2.0], y=[0.01, 0.2, 0.9])
    buy.fill(1, y=[0.3, 0.3, 0.4])
    genre = TemperatureScaling()
    genre.fill(0, slope=0.5)
    stars = [
        fitted(IsotonicValue(3), x=[0, 3, 5.0], y=[1, 2, 5.0]),
        fitted(UnitInterval(2), x=[1.0, 5.0], y=[0.0, 1.0]),
    ]
    return Calibration(TASKS, {"click": [PriorCorrection(0.2), click], "buy": buy, "genre": genre, "stars": stars})


class Served(nn.Module):
    """What a serving network does after the towers, with all kinds in one graph, since to make one takes seconds."""

    def __init__(self):
        super().__init__()
        self.kinds = nn.ModuleDict({kind: make() for kind, make in KINDS.items()})
        self.output = FusedOutput(TASKS, WeightedMean(WEIGHTS), {"genre": "genre"}, {"tab": 3}, calibration())

    def forward(self, logits, dense, embedding, values, lengths, request):
        features, pooled = _Features(["tab", "genre"], values, lengths), {"tab": embedding}
        out = self.output(logits, dense, features, pooled, request)
        out |= told_parts(self.output, out, features, dense, pooled, request)
        parts, rows = self.output.parts(out, features), RowContext(dense, pooled, request)
        for kind, fused_score in self.kinds.items():
            out[f"{kind} score"] = fuse(fused_score, parts, rows)
            told = contributions(fused_score, parts, rows) or {}
            out |= {f"{kind} part:{name}": value for name, value in told.items()}
        return out


def inputs(rows):
    torch.manual_seed(rows)
    logits = {name: 2 * torch.randn(rows) for name in ("click", "buy", "buy|click", "stars")}
    lengths = torch.stack([torch.ones(rows, dtype=torch.int64), torch.arange(rows) % 2])  # of genre, some have none
    return {
        "logits": logits | {"genre": torch.randn(rows, 4)}, "dense": torch.randn(rows, 2),
        "embedding": torch.randn(rows, 3), "values": torch.randint(4, (int(lengths.sum()),)), "lengths": lengths,
        "request": torch.arange(rows) // 3,
    }  # fmt: skip


@pytest.mark.full
def test_each_kind_after_each_calibration_is_exported():
    torch.manual_seed(0)
    served = Served().eval()
    for parameter in served.parameters():
        nn.init.normal_(parameter, std=0.5)
    rows = {0: Dim.AUTO}
    shapes: dict = dict.fromkeys(("dense", "embedding", "values", "request"), rows)
    shapes |= {"logits": dict.fromkeys(inputs(2)["logits"], rows), "lengths": {1: Dim.AUTO}}
    with torch.no_grad():
        made = torch.export.export(served, (), kwargs=inputs(6), strict=False, dynamic_shapes=shapes).module()
        for number in (1, 2, 17):
            given = inputs(number)
            expected, got = served(**given), made(**given)
            assert set(got) == set(expected)
            assert {kind for kind in KINDS if f"{kind} part:click" in got} == set(KINDS) - {"monotone"}
            assert {"buy|click", "part:buy", "genre:own_class", "score"} <= set(got)
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
        alone = served(**inputs(17) | {"request": torch.zeros(17, dtype=torch.int64)})
        for kind, fused_score in served.kinds.items():  # what compares is told which rows belong together
            same = torch.equal(alone[f"{kind} score"], expected[f"{kind} score"])
            assert same != getattr(fused_score, "within_request", False), kind
