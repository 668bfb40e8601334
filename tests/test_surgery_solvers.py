"""Solvers: each equals TorchJD's, or what its paper's optimisation problem says, on Gramians of every kind."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

from mtcl_torchrec.modules.balance.solvers import MOST_TASKS, CAGrad, FromGramian, NashMTL, UPGrad
from mtcl_torchrec.modules.balance.solvers_norms import DBMTL, GradNorm
from mtcl_torchrec.modules.balance.solvers_projection import GradVac, PCGrad
from mtcl_torchrec.modules.balance.surgery import KINDS, build_solver
from mtcl_torchrec.schema import ConfigError


def gramian(seed, tasks=3, dim=6, spread=1.0):
    """Of random gradients; their norms differ by factors around e^spread."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, dim, generator=g, dtype=torch.float64)
    rows = rows * torch.exp(spread * torch.randn(tasks, 1, generator=g, dtype=torch.float64))
    return rows @ rows.T


def solved(solver, g, losses=None):
    active = g.diagonal() > 0
    return solver(g, active, torch.ones(len(g), dtype=torch.float64) if losses is None else losses)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 8), st.sampled_from([0.0, 1.0, 2.0]))
def test_upgrad_is_torchjds(seed, tasks, dim, spread):
    g = gramian(seed, tasks, dim, spread)
    theirs = aggregation.UPGradWeighting(projector=QuadprogProjector(norm_eps=0.0))(g)
    torch.testing.assert_close(solved(UPGrad(tasks), g), tasks * theirs, atol=1e-6, rtol=1e-6)


def test_upgrad_of_more_tasks_than_sets_can_be_tried_is_torchjds_own():
    g = gramian(3, 12, 20)
    few = gramian(3, MOST_TASKS, 20)
    assert isinstance(build_solver("upgrad", MOST_TASKS), UPGrad)
    theirs = MOST_TASKS * aggregation.UPGradWeighting()(few / few.trace())
    torch.testing.assert_close(solved(UPGrad(MOST_TASKS), few), theirs, atol=1e-6, rtol=1e-6)
    many = build_solver("upgrad", 12)
    assert many.waits
    torch.testing.assert_close(solved(many, g), 12 * aggregation.UPGradWeighting()(g / g.trace()), atol=1e-6, rtol=0)


def cagrad_by_cvxpy(g, c):
    """The problem of the paper's algorithm 1, handed to a conic solver."""
    values, vectors = np.linalg.eigh(g.numpy() / np.trace(g.numpy()))
    root = vectors * np.sqrt(values.clip(0))
    mean = np.full(len(g), 1 / len(g))
    radius = c * np.linalg.norm(root.T @ mean)
    w = cp.Variable(len(g))
    cost = (root @ root.T @ mean) @ w + radius * cp.norm(root.T @ w, 2)
    cp.Problem(cp.Minimize(cost), [w >= 0, cp.sum(w) == 1]).solve(cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    return torch.from_numpy(mean + radius / np.linalg.norm(root.T @ w.value) * w.value), cost.value


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("c", [0.2, 0.6])
def test_cagrad_is_the_papers_optimum_and_torchjds(seed, c):
    tasks = 2 + seed % 4
    g = gramian(seed, tasks, spread=0.7)
    ours = solved(CAGrad(tasks, c=c), g)
    expected, _ = cagrad_by_cvxpy(g, c)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    theirs = aggregation.CAGradWeighting(c=c, norm_eps=0.0)(g)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # TorchJD's solver stops earlier


@pytest.mark.parametrize("seed", range(12))
def test_nash_mtl_is_the_bargaining_point(seed):
    tasks = 2 + seed % 4
    g = gramian(seed, tasks, spread=1.5)
    alpha = solved(NashMTL(), g)
    assert (alpha > 0).all()
    torch.testing.assert_close(g @ alpha, 1 / alpha, atol=0, rtol=1e-5)
    scale = float(g.diagonal().mean())
    x = cp.Variable(tasks)
    problem = cp.Minimize(cp.quad_form(x, cp.psd_wrap(g.numpy() / scale)) / 2 - cp.sum(cp.log(x)))
    cp.Problem(problem).solve(cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10)
    torch.testing.assert_close(alpha * scale**0.5, torch.from_numpy(x.value), atol=0, rtol=1e-4)


def test_nash_mtl_agrees_with_torchjds():
    gradients = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = aggregation.NashMTL(3, max_norm=0.0, optim_niter=100).weighting(gradients)
    ours = solved(NashMTL(), gradients @ gradients.T)
    torch.testing.assert_close(ours / ours.sum(), theirs / theirs.sum(), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("mgda", aggregation.MGDAWeighting()),
        ("imtl_g", aggregation.IMTLGWeighting()),
        ("aligned_mtl", aggregation.AlignedMTLWeighting()),
        ("fairgrad", aggregation.FairGradWeighting(alpha=1.0)),
    ],
)
def test_torchjds_weightings_see_the_normalised_gramian_of_the_active_tasks(kind, theirs):
    g = gramian(5, 3)
    expected = theirs(g / g.diagonal().mean())
    torch.testing.assert_close(solved(build_solver(kind, 3), g), expected)
    with_idle = torch.zeros(4, 4, dtype=torch.float64)
    places = torch.tensor([0, 1, 3])
    with_idle[places.unsqueeze(1), places] = g
    torch.testing.assert_close(solved(build_solver(kind, 4), with_idle)[places], expected)


def in_their_order(monkeypatch, orders):
    """Make torch.randperm give these orders, one after the other."""
    left = iter(orders)
    monkeypatch.setattr(torch, "randperm", lambda n: next(left))


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_pcgrad_is_torchjds_in_the_same_order(monkeypatch, tasks):
    solver = PCGrad(tasks, seed=tasks)
    for seed in range(5):
        g, order = gramian(seed, tasks, 3), solver.order()
        ours = solved(solver, g)
        in_their_order(monkeypatch, [torch.cat([row, torch.tensor([i])]) for i, row in enumerate(order)])
        torch.testing.assert_close(ours, aggregation.PCGradWeighting()(g), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_gradvac_is_torchjds_in_the_same_order_and_with_the_same_past(monkeypatch, tasks):
    solver, theirs = GradVac(tasks, beta=0.3, seed=1), aggregation.GradVacWeighting(beta=0.3, eps=1e-14)
    changed = 0
    for seed in range(8):
        g, order = gramian(seed, tasks, 4), solver.order()
        ours = solved(solver, g)
        others = [[j for j in range(tasks) if j != i] for i in range(tasks)]
        in_their_order(
            monkeypatch,
            [torch.tensor([of.index(j) for j in row.tolist()]) for of, row in zip(others, order, strict=True)],
        )
        expected = theirs(g)
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-7)
        changed += not torch.allclose(expected, torch.ones(tasks, dtype=torch.float64))
    assert changed > 3


def test_random_orders_are_fair_and_the_same_for_the_same_seed_and_step():
    solver = PCGrad(3, seed=4)
    first = torch.stack([solver.next_order() for _ in range(600)])
    assert (torch.bincount(first[:, 0, 0], minlength=3) > 250).tolist() == [False, True, True]
    again = PCGrad(3, seed=4)
    again.load_state_dict(solver.state_dict())
    assert torch.equal(again.next_order(), solver.next_order())
    assert not torch.equal(torch.stack([PCGrad(3, seed=5).others]), torch.stack([solver.others]))


def test_gradnorm_follows_the_gradient_of_its_loss():
    """Against autograd on the paper's equation 2."""
    solver = GradNorm(3, alpha=0.7, lr=0.05)
    g = torch.diag(torch.tensor([1.0, 4.0, 25.0])).double()
    weights, first = torch.ones(3, dtype=torch.float64), torch.tensor([2.0, 1.0, 4.0]).double()
    for step in range(5):
        losses = first * torch.tensor([1.0, 0.9, 0.5]).double() ** step
        torch.testing.assert_close(solved(solver, g, losses), weights)
        w = weights.clone().requires_grad_()
        norms = g.diagonal().sqrt() / g.diagonal().sqrt().mean()
        rate = (losses / first) / (losses / first).mean()
        target = ((w * norms).mean() * rate**0.7).detach()
        (w * norms - target).abs().sum().backward()
        weights = weights - 0.05 * w.grad
        weights = weights * 3 / weights.sum()


def test_db_mtl_brings_all_gradients_of_log_losses_to_one_norm():
    solver = DBMTL(3, beta=0.5)
    g, losses = gramian(2), torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    weighted = solved(solver, g, losses) * g.diagonal().sqrt()
    torch.testing.assert_close(weighted, torch.ones(3, dtype=torch.float64))
    solved(solver, 100 * g, losses)
    past = 0.5 / 2**0.5
    expected = g.diagonal().sqrt() / losses * (past + (1 - past) * 10)
    torch.testing.assert_close(solver.average, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6, 1e12])
def test_weights_do_not_depend_on_the_scale_of_the_loss(kind, factor):
    """Squared gradients far below and above every absolute constant in a solver."""
    g = gramian(8, 4, spread=0.5)
    plain, scaled = (solved(build_solver(kind, 4), of) for of in (g, g * factor))
    if build_solver(kind, 4).mean_one:
        plain, scaled = plain / plain.mean(), scaled / scaled.mean()
    torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=1e-6)


def synthetic(conflict):
    """Gradients of 3 tasks; the second pulls against the others the more, the greater the conflict."""
    rows = torch.tensor([[1.0, 0.2, 0.0], [-conflict, 1.0, 0.1], [0.3, -0.4 * conflict, 1.0]], dtype=torch.float64)
    return rows @ rows.T


@pytest.mark.parametrize("kind", ["upgrad", "mgda", "cagrad", "nash_mtl", "fairgrad", "aligned_mtl", "imtl_g"])
def test_no_task_loses_where_the_plain_sum_hurts_one(kind):
    g = synthetic(2.0)
    g = (
        torch.diag(torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64))
        @ g
        @ torch.diag(torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64))
    )
    assert (g.sum(1) < -0.1).any()  # the plain sum raises a loss
    weights = solved(build_solver(kind, 3, **({"c": 0.9} if kind == "cagrad" else {})), g)
    assert (g @ weights / weights.sum() > (-1e-3 if kind != "cagrad" else g.sum(1).min() / 3)).all()


@pytest.mark.parametrize("kind", ["upgrad", "pcgrad", "gradvac"])
def test_without_conflicts_the_sum_stays_as_it_is(kind):
    g = synthetic(0.0).clamp(min=0)
    tolerance = 1e-3 if kind == "upgrad" else 1e-12  # of the regularised Gramian
    solver = build_solver(kind, 3)
    torch.testing.assert_close(solved(solver, g), torch.ones(3, dtype=torch.float64), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_says_whether_it_waits_and_answers_rank_one_gramians(kind):
    solver = build_solver(kind, 3)
    assert solver.waits == isinstance(solver, FromGramian)
    row = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    weights = solved(solver, row @ row.T)
    assert torch.isfinite(weights).all()
    assert (weights >= -1e-9).all()


def test_an_unknown_kind_gets_a_hint():
    with pytest.raises(ConfigError, match=r"no gradient surgery 'upgrade'.*did you mean 'upgrad'"):
        build_solver("upgrade", 3)


def test_without_torchjd_the_extra_is_named(monkeypatch):
    import importlib

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'mtcl_torchrec\[balance\]'"):
        build_solver("mgda", 3)
    build_solver("upgrad", 3)
