"""Trunks: each equals the formula of its paper, sees and learns only what it may, and parts in two steps."""

import copy

import pytest
import torch
from torch.nn import functional as F

from mtcl_torchrec.modules.embeddings import InputBlock, input_blocks
from mtcl_torchrec.modules.gates import EPNet, PPNet
from mtcl_torchrec.modules.mixing import gate_logits, mixtures
from mtcl_torchrec.modules.trunks import (
    PLE,
    STEM,
    AdaTT,
    ExpertLevel,
    HoME,
    MMoE,
    Shared,
    SharedBottom,
    SingleTask,
    TrunkInputs,
    shared_parameters,
)
from mtcl_torchrec.schema import ConfigError, Task

TASKS = (Task.binary("a"), Task.binary("b"), Task.regression("c"))
# Two shared embeddings, a dense column, and tables of their own for tasks a and c.
BLOCKS = (
    InputBlock(2, "user", "t"), InputBlock(2, "hour", groups=("context",)),
    InputBlock(2, "user", "t", task="a"), InputBlock(2, "user", "t", task="c"), InputBlock(1),
)  # fmt: skip
WIDTH = 9
OWN = {0: [4, 5], 2: [6, 7]}  # columns of the tasks' own tables
COMMON = [0, 1, 2, 3, 8]


def ppnet():
    inner = MMoE(2, [4])
    inner.build(WIDTH, 3)
    outer = PPNet(["user"], hidden=3)
    outer.wrap(inner, torch.nn.Linear(WIDTH, WIDTH), BLOCKS, 3, tower_layers=[3])
    return outer


TRUNKS = {
    "shared_bottom": lambda: SharedBottom([6, 4]),
    "single_task": lambda: SingleTask([6, 4]),
    "mmoe": lambda: MMoE(num_experts=3, expert_layers=[6, 4]),
    "ple": lambda: PLE(shared_experts=2, task_experts=1, expert_layers=[6, 4], levels=3),
    "cgc": lambda: PLE(shared_experts=1, task_experts=2, expert_layers=[4], levels=1),
    "adatt": lambda: AdaTT([6, 4], task_experts=2, shared_experts=1, levels=2),
    "adatt_sp": lambda: AdaTT([4], levels=3),
    "home": lambda: HoME([6, 4], groups=[["a", "c"], ["b"]], group_experts=2, feature_rank=2),
    "home_by_kind": lambda: HoME([4], task_experts=2, feature_rank=0, norm="rms"),
    "stem": lambda: STEM([6, 4]),
    "stem_stacked": lambda: STEM([4], levels=3, task_experts=2),
    "ppnet": ppnet,
}


def built(name, seed=0):
    torch.manual_seed(seed)
    trunk = TRUNKS[name]()
    if name != "ppnet":
        trunk.build(WIDTH, 3, TrunkInputs(TASKS, BLOCKS))
    return trunk


def gradient_of(trunk, task, x=None):
    """The gradient of one task's representation by the input, and by every parameter (in .grad)."""
    x = torch.randn(7, WIDTH) if x is None else x
    x = x.detach().requires_grad_()
    trunk.zero_grad()
    out = trunk(x, [0, 1, 2])[:, task]
    (out * torch.randn_like(out)).sum().backward()
    return x.grad


# ---------------------------------------------------------------- what holds for every trunk


@pytest.mark.parametrize("name", TRUNKS)
def test_a_choice_of_tasks_is_the_choice_of_their_representations(name):
    trunk = built(name)
    x = torch.randn(7, WIDTH)
    everything = trunk(x, [0, 1, 2])
    assert everything.shape == (7, 3, trunk.out_features)
    for tasks in ([0], [2], [2, 0], [1, 2]):
        torch.testing.assert_close(trunk(x, tasks), everything[:, tasks])


@pytest.mark.parametrize("name", TRUNKS)
def test_every_parameter_learns(name):
    trunk = built(name)
    out = trunk(torch.randn(64, WIDTH), [0, 1, 2])
    (out * torch.randn_like(out)).sum().backward()
    for parameter_name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("tasks", [[0, 1, 2], [2, 0]])
def test_tasks_may_read_copies_of_what_they_share(name, tasks):
    """The same outputs and gradients, and each copy has the gradient of its task alone."""
    trunk = built(name)
    x = torch.randn(5, WIDTH)
    direction = torch.randn(5, len(tasks), trunk.out_features)
    leaf = x.clone().requires_grad_()
    together = trunk(leaf, tasks)
    (together * direction).sum().backward()
    expected = {n: p.grad.clone() for n, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad(set_to_none=True)

    again = x.clone().requires_grad_()
    shared = trunk.shared(again, tasks)
    assert all(own.shape[0] == len(tasks) for own in shared.own)
    copies = tuple(torch.stack([tensor] * len(tasks)) for tensor in shared.common)
    for tensor in copies:
        tensor.retain_grad()
    apart = trunk.split(Shared(copies, shared.own), tasks)
    torch.testing.assert_close(apart, together)
    (apart * direction).sum().backward(retain_graph=True)
    torch.testing.assert_close(again.grad, leaf.grad)
    for parameter_name, parameter in trunk.named_parameters():
        if parameter_name in expected:
            torch.testing.assert_close(parameter.grad, expected[parameter_name])

    of_all = [tensor.grad.clone() for tensor in copies]
    for tensor in copies:
        tensor.grad = None
    (apart[:, 0] * direction[:, 0]).sum().backward()
    for tensor, gradient in zip(copies, of_all, strict=True):
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad[0], gradient[0])
            assert tensor.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("name", TRUNKS)
def test_shared_parameters_are_those_that_several_tasks_reach(name):
    """Found by backward passes task by task; what comes after the split is no task's to share."""
    trunk = built(name)
    x = torch.randn(64, WIDTH)
    reached: dict[str, torch.Tensor] = {}
    for task in range(3):
        gradient_of(trunk, task, x)
        for parameter_name, parameter in trunk.named_parameters():
            rows = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            touched = (rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)).abs().sum(1) > 0
            reached[parameter_name] = reached.get(parameter_name, 0) + touched.int()
    told = {id(parameter): rows for parameter, rows in shared_parameters(trunk)}
    for parameter_name, parameter in trunk.named_parameters():
        several = (reached[parameter_name] > 1).nonzero().flatten().tolist()
        rows = told.get(id(parameter), [])
        assert (list(range(len(parameter))) if rows is None else rows) == several, parameter_name
    assert len(told) == len(shared_parameters(trunk))


def test_a_trunk_of_ones_own_shares_all_its_parameters():
    trunk = torch.nn.Linear(3, 2)
    assert [(id(p), rows) for p, rows in shared_parameters(trunk)] == [(id(p), None) for p in trunk.parameters()]


@pytest.mark.parametrize("name", TRUNKS)
def test_training_notes_its_mixes_until_they_are_forgotten(name):
    trunk = built(name)
    trunk(torch.randn(5, WIDTH), [0, 1, 2])
    for level in (module for module in trunk.modules() if isinstance(module, ExpertLevel)):
        assert all(torch.allclose(mix.weights.sum(-1), torch.ones(())) for mix in level.mixes)
        assert len(level.mixes) == (level.gate_weight is not None)
        assert copy.deepcopy(level).mixes == []
        level.forget_mixes()
        level.eval()
    trunk(torch.randn(5, WIDTH), [0, 1, 2])
    assert not any(module.mixes for module in trunk.modules() if isinstance(module, ExpertLevel))


# ---------------------------------------------------------------- each against its paper, written out task by task


def softmax_mixture(level, gate, experts, outputs, stream):
    weights = torch.softmax(stream @ level.gate_weight[gate][experts].T, dim=1)
    return sum(weights[:, i : i + 1] * outputs[e] for i, e in enumerate(experts))


def expert(level, e, x):
    """One expert by itself, with its feature gate."""
    experts = level.experts
    if experts.feature_gates is not None:
        down, up = experts.feature_gates
        x = x * (2 * torch.sigmoid(x @ down[e].T @ up[e].T))
    for i, (weight, bias) in enumerate(zip(experts.weights, experts.biases, strict=True)):
        x = F.linear(x, weight[e], bias[e])
        if experts.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:]) * experts.scales[i][e] + experts.shifts[i][e]
        elif experts.norm == "rms":
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * experts.scales[i][e]
        x = x * torch.sigmoid(x)
    return x


def test_shared_bottom_gives_every_task_the_same():
    out = built("shared_bottom")(torch.randn(4, WIDTH), [0, 1, 2])
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


def test_mmoe_is_the_papers_mixture():
    trunk = built("mmoe")
    x, level = torch.randn(6, WIDTH), trunk.levels[0]
    outputs = [expert(level, e, x) for e in range(3)]
    expected = [softmax_mixture(level, t, [0, 1, 2], outputs, x) for t in range(3)]
    torch.testing.assert_close(trunk(x, [0, 1, 2]), torch.stack(expected, 1))


def test_ple_is_the_papers_extraction():
    torch.manual_seed(0)
    trunk = PLE(shared_experts=1, task_experts=2, expert_layers=[4], levels=2)
    trunk.build(5, 2)
    x, (first, last) = torch.randn(6, 5), trunk.levels
    outputs = [expert(first, e, x) for e in range(5)]
    seen = {0: [0, 1, 4], 1: [2, 3, 4], 2: [0, 1, 2, 3, 4]}
    streams = [softmax_mixture(first, g, seen[g], outputs, x) for g in (0, 1, 2)]
    outputs = [expert(last, e, streams[s]) for e, s in enumerate([0, 0, 1, 1, 2])]
    expected = torch.stack([softmax_mixture(last, t, seen[t], outputs, streams[t]) for t in (0, 1)], 1)
    torch.testing.assert_close(trunk(x, [0, 1]), expected)


@pytest.mark.parametrize(("own", "shared"), [(1, 0), (2, 0), (2, 1), (1, 1)])
def test_adatt_is_the_papers_fusion(own, shared):
    torch.manual_seed(0)
    tasks, levels = 3, 2
    trunk = AdaTT([4], task_experts=own, shared_experts=shared, levels=levels)
    trunk.build(5, tasks)
    x = torch.randn(6, 5)
    natives = {u: list(range(u * own, (u + 1) * own)) for u in range(tasks)}
    if shared:
        natives[tasks] = list(range(tasks * own, tasks * own + shared))
    streams = dict.fromkeys(natives, x)
    for number, level in enumerate(trunk.levels):
        outputs = {e: expert(level, e, streams[u]) for u, of in natives.items() for e in of}
        units = [u for u in natives if u < tasks or number < levels - 1]
        fused = {}
        for u in units:
            everything = softmax_mixture(level, u, sorted(outputs), outputs, streams[u])
            if own == 1 and shared <= 1:
                assert level.native_weight is None
                native = outputs[natives[u][0]]
            else:
                with torch.no_grad():  # not only as they start
                    level.native_weight[u] += torch.randn(len(outputs))
                native = sum(level.native_weight[u, e] * outputs[e] for e in natives[u])
            fused[u] = everything + native
        streams = fused
    expected = torch.stack([streams[t] for t in range(tasks)], 1)
    torch.testing.assert_close(trunk(x, list(range(tasks))), expected)


def self_gate(level, gate, experts, outputs, stream):
    logits = stream @ level.native_weight[gate][experts].T
    weights = torch.sigmoid(logits) if len(experts) == 1 else torch.softmax(logits, 1)
    return sum(weights[:, i : i + 1] * outputs[e] for i, e in enumerate(experts))


@pytest.mark.parametrize("each", [1, 2])
def test_home_is_the_hierarchy_that_it_says(each):
    """Groups {0, 2} and {1}."""
    torch.manual_seed(0)
    trunk = HoME(
        [4], groups=[[0, 2], [1]], shared_experts=1, group_experts=each, task_experts=each, feature_rank=2
    )  # fmt: skip
    trunk.build(5, 3)
    x, (meta, last) = torch.randn(6, 5), trunk.levels
    groups = {0: list(range(each)), 1: list(range(each, 2 * each)), "shared": [2 * each]}
    outputs = [expert(meta, e, x) for e in range(2 * each + 1)]
    streams = {}
    for gate, (name, own) in enumerate(groups.items()):
        seen = sorted(e for of in groups.values() for e in of) if name == "shared" else own + groups["shared"]
        streams[name] = softmax_mixture(meta, gate, seen, outputs, x) + self_gate(meta, gate, own, outputs, x)

    own = {t: list(range(t * each, (t + 1) * each)) for t in range(3)}
    of_group = {c: [3 * each + e for e in groups[c]] for c in groups}
    group = {0: 0, 1: 1, 2: 0}
    outputs = {e: expert(last, e, streams[group[t]]) for t in own for e in own[t]}
    outputs |= {e: expert(last, e, streams[c]) for c, experts in of_group.items() for e in experts}
    expected = []
    for t in range(3):
        stream, seen = streams[group[t]], own[t] + of_group[group[t]] + of_group["shared"]
        mixture = softmax_mixture(last, t, seen, outputs, stream)
        expected.append(mixture + self_gate(last, t, own[t], outputs, stream))
    torch.testing.assert_close(trunk(x, [0, 1, 2]), torch.stack(expected, 1))


@pytest.mark.parametrize("levels", [1, 2])
def test_stem_is_the_papers_gating_with_its_stopped_gradients(levels):
    """Values and gradients, experts of others detached."""
    torch.manual_seed(0)
    trunk = STEM([4], task_experts=1, shared_experts=2, levels=levels)
    trunk.build(WIDTH, 3, TrunkInputs(TASKS, BLOCKS))
    data = torch.randn(6, WIDTH)
    direction = torch.randn(6, 3, 4)
    owner = [0, 1, 2, "s", "s"]

    x = data.clone().requires_grad_()
    streams = {0: x[:, [4, 5, 2, 3, 8]], 1: x[:, COMMON], 2: x[:, [6, 7, 2, 3, 8]], "s": x[:, COMMON]}
    for number, level in enumerate(trunk.levels):
        outputs = [expert(level, e, streams[u]) for e, u in enumerate(owner)]
        mixed = {}
        for gate, unit in enumerate(streams):
            if unit == "s" and number == levels - 1:
                continue
            seen = [o if u in (unit, "s") else o.detach() for o, u in zip(outputs, owner, strict=True)]
            mixed[unit] = softmax_mixture(level, gate, list(range(5)), seen, streams[unit] + streams["s"])
        streams = mixed
    expected = torch.stack([streams[t] for t in range(3)], 1)
    (expected * direction).sum().backward()
    gradients = {n: p.grad.clone() for n, p in trunk.named_parameters()}
    trunk.zero_grad()

    leaf = data.clone().requires_grad_()
    out = trunk(leaf, [0, 1, 2])
    torch.testing.assert_close(out, expected)
    (out * direction).sum().backward()
    torch.testing.assert_close(leaf.grad, x.grad)
    for name, parameter in trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def gate_unit(units, gate, layer, x):
    """2·sigmoid(relu(x W + b) W' + b') for one gate and one of its outputs."""
    hidden = slice(layer * units.hidden, (layer + 1) * units.hidden)
    h = torch.relu(F.linear(x, units.weights[0][gate][hidden], units.biases[0][gate][hidden]))
    return 2 * torch.sigmoid(F.linear(h, units.weights[layer + 1][gate], units.biases[layer + 1][gate]))


def test_epnet_is_the_papers_gate_and_its_input_learns_through_the_named_features_only():
    torch.manual_seed(0)
    epnet = EPNet(hidden=3)  # the context's features: "hour"
    epnet.build(BLOCKS)
    x = torch.randn(5, WIDTH, requires_grad=True)
    gate = gate_unit(epnet.gate, 0, 0, torch.cat([x[:, 2:4], x.detach()], 1))
    out, expected = epnet(x), x * gate
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    (mine,) = torch.autograd.grad((out * direction).sum(), x)
    (theirs,) = torch.autograd.grad((expected * direction).sum(), x)
    torch.testing.assert_close(mine, theirs)
    through_gate = mine - (gate * direction).detach()
    assert through_gate[:, 2:4].abs().sum() > 0
    torch.testing.assert_close(through_gate[:, [0, 1, 4, 5, 6, 7, 8]], torch.zeros(5, 7))


def test_ppnet_scales_the_trunk_and_gives_the_towers_their_gates():
    outer = built("ppnet")
    x = torch.randn(5, WIDTH)
    out = outer(x, [0, 2])
    inner = outer.trunk(outer.interaction(x), [0, 2])
    read = torch.cat([x[:, :2], x], 1)  # of "user", the shared table's columns only
    for place, task in enumerate([0, 2]):
        torch.testing.assert_close(out[:, place, :4], inner[:, place] * gate_unit(outer.gates, task, 0, read))
        torch.testing.assert_close(out[:, place, 4:], gate_unit(outer.gates, task, 1, read))
    first, (second,) = outer.apart(out)
    assert (first.shape, second.shape) == ((5, 2, 4), (5, 2, 3))


def test_ppnet_goes_around_a_trunk_without_two_steps():
    class Own(torch.nn.Module):
        out_features = WIDTH

        def forward(self, x, tasks):
            return torch.stack([x * (t + 1) for t in tasks], 1)

    outer = PPNet(["user"])
    outer.wrap(Own(), torch.nn.Identity(), BLOCKS, 3, tower_layers=[2])
    x = torch.randn(4, WIDTH)
    shared = outer.shared(x, [2, 1])
    assert [tuple(t.shape) for t in shared.own] == [(2, 4, WIDTH)]
    torch.testing.assert_close(outer.split(shared, [2, 1]), outer(x, [2, 1]))
    assert outer(x, [2, 1]).shape == (4, 2, WIDTH + 2)


# ---------------------------------------------------------------- who may touch what


def test_single_task_shares_nothing():
    trunk = built("single_task")
    gradient_of(trunk, 1)
    gradient = trunk.levels[0].experts.weights[0].grad
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0
    assert shared_parameters(trunk) == []


def test_a_task_of_ple_never_reads_another_tasks_expert():
    trunk = built("cgc")
    gradient_of(trunk, 0)
    touched = trunk.levels[0].experts.weights[0].grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [True, True, False, False, False, False, True]


@pytest.mark.parametrize("name", ["stem", "stem_stacked"])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_task_of_stem_learns_its_own_and_the_shared_columns_only_but_reads_all(name, task):
    trunk = built(name)
    gradient = gradient_of(trunk, task).abs().sum(0)
    others = [column for owner, columns in OWN.items() if owner != task for column in columns]
    assert (gradient[others] == 0).all()
    assert (gradient[COMMON + OWN.get(task, [])] > 0).all()
    per_task = trunk.task_experts
    for level in trunk.levels:
        touched = level.experts.weights[0].grad.abs().sum((1, 2)) > 0
        own = [e for e in range(3 * per_task) if e // per_task == task]
        assert touched.nonzero().flatten().tolist() == [*own, 3 * per_task]
    # It reads what it does not learn.
    x = torch.randn(4, WIDTH)
    moved = x.clone()
    moved[:, others] += 1
    assert (trunk(x, [task]) - trunk(moved, [task])).abs().max() > 1e-3


def test_a_task_of_home_never_touches_another_group_but_through_what_is_shared():
    trunk = built("home")  # groups a, c and b; experts of the second level: 3 own, 4 of groups, 1 shared
    gradient_of(trunk, 1)
    touched = trunk.levels[1].experts.weights[0].grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, False, False, False, True, True, True]
    # The first level's shared gate mixes all groups.
    assert (trunk.levels[0].experts.weights[0].grad.abs().sum((1, 2)) > 0).all()
    assert trunk.levels[0].gate_weight.grad[0].abs().sum() == 0
    assert trunk.levels[0].native_weight.grad[0].abs().sum() == 0


def test_home_groups_tasks_by_kind_unless_told():
    trunk = HoME([4])
    assert trunk._numbered(3, TrunkInputs(TASKS, BLOCKS)) == [[0, 1], [2]]
    assert trunk._numbered(3, None) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a", "b"]], "task 'c' is in none"),
        ([["a", "b"], ["c", "a"]], "task 'a' is in two"),
        ([["a", "b"], ["cc"]], r"no task 'cc' \(did you mean 'c'"),
        ([[0, 1], [3]], "no task 3"),
        ([["a", 1, 2], []], "one is empty"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        HoME([4], groups=groups).build(WIDTH, 3, TrunkInputs(TASKS, BLOCKS))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([InputBlock(2, "user")], r"no task has an embedding table of its own; .*with_own_tables"),
        ([InputBlock(2, "user", "t"), InputBlock(4, "user", "t", task="a")], "has 4 columns .* shared table has 2"),
        ([InputBlock(2, "hour"), InputBlock(4, "user", "t", task="a")], "shared table has none"),
    ],
)
def test_tables_that_stem_cannot_use_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        STEM([4]).build(sum(b.width for b in blocks), 3, TrunkInputs(TASKS, tuple(blocks)))


def test_blocks_say_whose_a_table_is():
    tasks = [Task.binary("a.b"), Task.binary("t")]
    dims = {"user@x@y": 4, "user@x@y@a_b": 4, "item@t": 2, "item@t@t": 2, "tag@more@other": 2, "hour": 2}
    blocks = input_blocks(dims, 2, tasks, {"user": ["user"]}, [["item"], ["context"]])
    assert [(b.feature, b.table, b.task) for b in blocks] == [
        ("user", "x@y", None), ("user", "x@y", "a.b"), ("item", "t", None), ("item", "t", "t"),
        ("tag", "more@other", None), ("hour", "", None), (None, "", None), (None, "", None),
    ]  # fmt: skip
    assert [b.groups for b in blocks[:3]] == [("user",), ("user",), ()]
    assert [b.groups for b in blocks[-2:]] == [("item",), ("context",)]


def test_a_gate_on_features_that_are_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"epnet: no sparse feature 'hours' in a shared table \(did you mean 'hour'"):
        EPNet(["hours"]).build(BLOCKS)
    with pytest.raises(ConfigError, match="group context; name features"):
        EPNet().build(BLOCKS[:1])
    with pytest.raises(ConfigError, match=r"pass a trunk, and the PPNet as ppnet="):
        PPNet().build(3, 2)


# ---------------------------------------------------------------- levels


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


def test_masks_that_make_no_sense_are_refused():
    sees = torch.tensor([[True, False], [True, True]])
    with pytest.raises(ValueError, match="every gate must see an expert"):
        ExpertLevel(5, [4], sees=torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="only experts that it sees"):
        ExpertLevel(5, [4], sees=sees, learns=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs gate_reads"):
        ExpertLevel(5, [4], sees=sees, gates_also_read=0)


@pytest.mark.parametrize("residual", ["linear", "gate"])
def test_a_gate_without_native_experts_has_no_residual(residual):
    torch.manual_seed(0)
    sees, native = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False], [False] * 3])
    level = ExpertLevel(5, [4], sees, native=native, residual=residual)
    plain = ExpertLevel(5, [4], sees)
    plain.load_state_dict({n: p for n, p in level.state_dict().items() if n != "native_weight"})
    x = torch.randn(6, 5)
    out = level(x)
    torch.testing.assert_close(out[1], plain(x)[1])
    assert (out[0] - plain(x)[0]).abs().max() > 1e-3
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in level.parameters())


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
