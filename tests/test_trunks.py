"""Trunks: each equals the formula of its paper, sees only what it may, and takes any choice of tasks."""

import pytest
import torch

from mtcl_torchrec.modules.gates import gate_logits, mixtures
from mtcl_torchrec.modules.trunks import PLE, ExpertLevel, MMoE, SharedBottom, SingleTask

TRUNKS = {
    "shared_bottom": lambda: SharedBottom([6, 4]),
    "single_task": lambda: SingleTask([6, 4]),
    "mmoe": lambda: MMoE(num_experts=3, expert_layers=[6, 4]),
    "ple": lambda: PLE(shared_experts=2, task_experts=1, expert_layers=[6, 4], levels=3),
    "cgc": lambda: PLE(shared_experts=1, task_experts=2, expert_layers=[4], levels=1),
}


def built(name, in_features=5, num_tasks=3, seed=0):
    torch.manual_seed(seed)
    trunk = TRUNKS[name]()
    trunk.build(in_features, num_tasks)
    return trunk


@pytest.mark.parametrize("name", TRUNKS)
def test_a_choice_of_tasks_is_the_choice_of_their_representations(name):
    trunk = built(name)
    x = torch.randn(7, 5)
    everything = trunk(x, [0, 1, 2])
    assert everything.shape == (7, 3, trunk.out_features)
    for tasks in ([0], [2], [2, 0], [1, 2]):
        torch.testing.assert_close(trunk(x, tasks), everything[:, tasks])


@pytest.mark.parametrize("name", TRUNKS)
def test_every_parameter_learns(name):
    trunk = built(name)
    trunk(torch.randn(64, 5), [0, 1, 2]).square().sum().backward()
    for parameter_name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_shared_bottom_gives_every_task_the_same():
    out = built("shared_bottom")(torch.randn(4, 5), [0, 1, 2])
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


def test_single_task_shares_nothing():
    trunk = built("single_task")
    trunk(torch.randn(4, 5), [0, 1, 2])[:, 1].sum().backward()
    gradient = trunk.level.experts.weights[0].grad
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


def test_mmoe_is_the_papers_mixture():
    trunk = built("mmoe")
    x = torch.randn(6, 5)
    experts = trunk.level.experts(x)
    expected = []
    for task in range(3):
        gate = torch.softmax(x @ trunk.level.gate_weight[task].T, dim=1)
        expected.append(sum(gate[:, e : e + 1] * experts[e] for e in range(3)))
    torch.testing.assert_close(trunk(x, [0, 1, 2]), torch.stack(expected, 1))


def test_ple_is_the_papers_extraction():
    """Two levels written out task by task, from the paper's equations."""
    torch.manual_seed(0)
    tasks, own, shared = 2, 2, 1
    trunk = PLE(shared_experts=shared, task_experts=own, expert_layers=[4], levels=2)
    trunk.build(5, tasks)
    x = torch.randn(6, 5)
    first, last = trunk.levels
    outputs = first.experts(x)

    def mixture(level, gate, experts, outputs, stream):
        weights = torch.softmax(stream @ level.gate_weight[gate][experts].T, dim=1)
        return sum(weights[:, i : i + 1] * outputs[e] for i, e in enumerate(experts))

    seen = {0: [0, 1, 4], 1: [2, 3, 4], 2: [0, 1, 2, 3, 4]}
    streams = torch.stack([mixture(first, g, seen[g], outputs, x) for g in (0, 1, 2)])
    outputs = last.experts(streams)
    expected = torch.stack([mixture(last, t, seen[t], outputs, streams[t]) for t in (0, 1)], 1)
    torch.testing.assert_close(trunk(x, [0, 1]), expected)


def test_a_task_of_ple_never_reads_another_tasks_expert():
    trunk = built("cgc")
    trunk(torch.randn(4, 5), [0, 1, 2])[:, 0].sum().backward()
    gradient = trunk.levels[0].experts.weights[0].grad
    touched = gradient.abs().sum((1, 2)) > 0
    assert touched.tolist() == [True, True, False, False, False, False, True]


def test_gate_dropout_leaves_out_experts_but_never_all():
    torch.manual_seed(0)
    level = ExpertLevel(5, [4], sees=torch.ones(2, 3, dtype=torch.bool), gate_dropout=0.9)
    weights = level.gate_weights(torch.randn(500, 5), [0, 1], [0, 1, 2])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 500))
    assert 0.4 < (weights == 0).float().mean() < 0.9
    level.eval()
    assert (level.gate_weights(torch.randn(500, 5), [0, 1], [0, 1, 2]) > 0).all()


def test_gate_dropout_never_shows_a_hidden_expert():
    torch.manual_seed(0)
    sees = torch.tensor([[True, True, False], [False, True, True]])
    level = ExpertLevel(5, [4], sees=sees, gate_dropout=0.7)
    weights = level.gate_weights(torch.randn(300, 5), [0, 1], [0, 1, 2])
    assert (weights[0, :, 2] == 0).all()
    assert (weights[1, :, 0] == 0).all()


def test_a_gate_without_experts_is_refused():
    with pytest.raises(ValueError, match="every gate must see an expert"):
        ExpertLevel(5, [4], sees=torch.tensor([[True], [False]]))


@pytest.mark.parametrize("expanded", [True, False])
def test_the_logits_of_gates_and_their_gradients_are_those_of_one_product_a_gate(expanded):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1 if expanded else 3, 7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gate_logits(x.expand(3, 7, 5), weight), x @ weight.transpose(1, 2))
    assert torch.autograd.gradcheck(lambda x, w: gate_logits(x.expand(3, 7, 5), w), (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate_logits(x.float().expand(3, 7, 5), weight.float())
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("copied", [True, False])
def test_mixtures_and_their_gradients_are_those_of_the_sum(copied):
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(*((3,) if copied else ()), 2, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("gbe,gebh->gbh", weights, outputs.expand(3, 2, 5, 4))
    torch.testing.assert_close(mixtures(weights, outputs), expected)
    assert torch.autograd.gradcheck(mixtures, (weights, outputs))
    assert torch.autograd.gradcheck(lambda w, o: mixtures(w, o.expand(3, 2, 5, 4)), (weights, outputs))
