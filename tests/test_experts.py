"""Batched experts against a plain loop over separate networks."""

import pytest
import torch
from torch import nn

from mtcl_torchrec.modules.experts import LOOP_FROM_OUTPUTS, BatchedExperts


def loop_of(experts: BatchedExperts) -> list[nn.Sequential]:
    """The same networks, one by one, from torch.nn's own layers."""
    networks = []
    for e in range(experts.num_experts):
        layers: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(experts.weights, experts.biases, strict=True)):
            linear = nn.Linear(weight.shape[2], weight.shape[1])
            linear.weight, linear.bias = nn.Parameter(weight[e].clone()), nn.Parameter(bias[e].clone())
            layers.append(linear)
            if experts.norm == "layer":
                norm: nn.Module = nn.LayerNorm(weight.shape[1])
                norm.weight, norm.bias = (
                    nn.Parameter(experts.scales[i][e].clone()),
                    nn.Parameter(experts.shifts[i][e].clone()),
                )
                layers.append(norm)
            elif experts.norm == "rms":
                norm = nn.RMSNorm(weight.shape[1], eps=1e-6)
                norm.weight = nn.Parameter(experts.scales[i][e].clone())
                layers.append(norm)
            layers.append(nn.SiLU())
        networks.append(nn.Sequential(*layers))
    return networks


def randomise(experts: BatchedExperts) -> BatchedExperts:
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return experts


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("layers", [[7], [6, 5], [6, 5, 4]])
def test_outputs_and_gradients_equal_the_loop(norm, layers):
    torch.manual_seed(0)
    experts = randomise(BatchedExperts(9, layers, num_experts=3, norm=norm))
    loop = loop_of(experts)
    x = torch.randn(11, 9, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = experts(x), torch.stack([network(y) for network in loop])
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for e, network in enumerate(loop):
        torch.testing.assert_close(experts.weights[0].grad[e], network[0].weight.grad)
        torch.testing.assert_close(
            experts.biases[-1].grad[e], [m for m in network if isinstance(m, nn.Linear)][-1].bias.grad
        )


def test_experts_that_read_different_streams_equal_the_loop():
    torch.manual_seed(1)
    reads = [0, 0, 2, 1]
    experts = randomise(BatchedExperts(5, [6, 3], num_experts=4, reads=reads))
    x = torch.randn(3, 8, 5)
    expected = torch.stack([network(x[s]) for network, s in zip(loop_of(experts), reads, strict=True)])
    torch.testing.assert_close(experts(x), expected)
    torch.testing.assert_close(experts(x, only=[3, 1]), expected[[3, 1]])


def test_a_choice_of_experts_is_the_choice_of_their_outputs():
    torch.manual_seed(2)
    experts = randomise(BatchedExperts(5, [6, 3], num_experts=4))
    x = torch.randn(8, 5)
    torch.testing.assert_close(experts(x, only=[2, 0]), experts(x)[[2, 0]])


def test_start_as_linear_layers_do():
    torch.manual_seed(3)
    experts = BatchedExperts(400, [300], num_experts=2)
    weight = experts.weights[0].detach()
    assert weight.abs().max() <= 400**-0.5
    assert weight.std() == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)
    assert not torch.equal(weight[0], weight[1])


def test_dropout_acts_while_training_only():
    torch.manual_seed(4)
    experts = BatchedExperts(5, [50], num_experts=2, norm="none", dropout=0.5)
    x = torch.randn(20, 5)
    dropped = (experts(x) == 0).float().mean().item()
    assert 0.4 < dropped < 0.6
    experts.eval()
    assert torch.equal(experts(x), experts(x))
    assert (experts(x) != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "widths"),
        ({"layers": [0]}, "widths"),
        ({"num_experts": 0}, "widths"),
        ({"norm": "batch"}, "'batch'"),
        ({"reads": [0]}, "reads names 1"),
        ({"feature_rank": -1}, "feature_rank"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchedExperts(**{"in_features": 4, "layers": [3], "num_experts": 2, **arguments})


@pytest.mark.parametrize("reads", [None, [0, 0, 2, 1]])
def test_feature_gates_equal_the_loop(reads):
    """Each expert scales its own input by 2·sigmoid of a low-rank product."""
    torch.manual_seed(5)
    experts = randomise(BatchedExperts(5, [6, 3], num_experts=4, reads=reads, feature_rank=2))
    x = torch.randn(3, 8, 5) if reads else torch.randn(8, 5)
    down, up = experts.feature_gates
    expected = []
    for e, network in enumerate(loop_of(experts)):
        stream = x[reads[e]] if reads else x
        expected.append(network(stream * 2 * torch.sigmoid(stream @ down[e].T @ up[e].T)))
    torch.testing.assert_close(experts(x), torch.stack(expected))
    torch.testing.assert_close(experts(x, only=[3, 1]), torch.stack(expected)[[3, 1]])


def test_factors_scale_the_output_of_every_layer():
    torch.manual_seed(6)
    experts = randomise(BatchedExperts(5, [6, 3], num_experts=2, reads=[0, 1]))
    x, factors = torch.randn(2, 8, 5), [torch.rand(2, 8, 6), torch.rand(2, 8, 3)]
    expected = []
    for e, network in enumerate(loop_of(experts)):
        h = network[:3](x[e]) * factors[0][e]
        expected.append(network[3:](h) * factors[1][e])
    torch.testing.assert_close(experts(x, factors=factors), torch.stack(expected))


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize(
    ("reads", "only", "gated", "scaled"),
    [(None, None, 0, False), (None, [2, 0], 2, True), ([0, 1, 1], None, 0, True), ([1, 0, 1], [2, 1], 2, False)],
)
def test_both_forms_are_one_network(norm, reads, only, gated, scaled):
    torch.manual_seed(3)
    made = [
        BatchedExperts(9, [6, 4], 3, norm=norm, reads=reads, feature_rank=gated, form=form)
        for form in ("batched", "loop")
    ]
    randomise(made[0])
    made[1].load_state_dict(made[0].state_dict())
    x = torch.randn((5, 9) if reads is None else (2, 5, 9))
    e = len(only or range(3))
    factors = [torch.randn(e, 5, width) for width in (6, 4)] if scaled else None
    found = []
    for experts in made:
        given = x.clone().requires_grad_()
        out = experts(given, only, factors)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out, given.grad, *(p.grad for p in experts.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_large_experts_are_computed_one_by_one():
    x = torch.randn(2, 80)
    assert BatchedExperts(80, [256, 128], 4)._one_by_one(x)
    assert not BatchedExperts(80, [32, 16], 64)._one_by_one(x)
    assert not BatchedExperts(80, [256, 128], 4)._one_by_one(x.to("meta"))
    with pytest.raises(ValueError, match="form is one of auto, batched, loop, not 'bmm'"):
        BatchedExperts(4, [4], 2, form="bmm")


def test_both_forms_drop_out_as_much():
    torch.manual_seed(4)
    for form in ("batched", "loop"):
        out = BatchedExperts(8, [64], 3, dropout=0.25, form=form)(torch.randn(200, 8))
        assert abs((out == 0).float().mean() - 0.25) < 0.02


def test_many_outputs_are_computed_expert_by_expert_but_in_a_graph(monkeypatch):
    experts = BatchedExperts(8, [64, 32], 16)
    few, many = torch.randn(16, 8), torch.randn(LOOP_FROM_OUTPUTS // (16 * 96) + 1, 8)
    assert [experts._one_by_one(x) for x in (few, many)] == [False, True]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not experts._one_by_one(many)
