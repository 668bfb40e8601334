"""Float32 products by oneDNN: torch's own, but for rounding, and only where they are meant to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mtcl_torchrec.modules import linear as of_module
from mtcl_torchrec.modules.experts import BatchedExperts
from mtcl_torchrec.modules.linear import linear

pytestmark = pytest.mark.skipif(of_module._product() is None, reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """Taken for products of any size, whatever the processor; counts the calls."""
    calls = []
    product = of_module._product()
    monkeypatch.setattr(of_module, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(of_module, "LEAST", 0)
    monkeypatch.setattr(of_module, "_product", lambda: lambda *of: calls.append(1) or product(*of))
    return calls


def gradients(function, x, weight, bias, seed, dtype):
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    out = function(*inputs)
    torch.manual_seed(seed)
    (out * torch.randn(out.shape).to(dtype)).sum().backward()
    return [out.detach(), *(t.grad for t in inputs if t is not None)]


# In < out, narrow, and wide outputs: each has the weight's gradient in an order of its own.
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70), width=st.sampled_from([1, 7, 80, 130]), out=st.sampled_from([1, 5, 33, 64, 129, 256]),
    bias=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_values_and_gradients_are_those_of_float64(rows, width, out, bias, transposed, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_module, "mkl_is_slow", lambda: True)
        patch.setattr(of_module, "LEAST", 0)
        torch.manual_seed(seed)
        x = torch.randn(width, rows).t() if transposed else torch.randn(rows, width)
        weight, b = torch.randn(out, width), torch.randn(out) if bias else None
        found = gradients(linear, x, weight, b, seed, torch.float32)
        true = gradients(F.linear, x, weight, b, seed, torch.float64)
        for one, other in zip(found, true, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_experts_train_alike_in_both(onednn):
    torch.manual_seed(0)
    experts = BatchedExperts(80, [96, 32], 3, form="loop")
    x = torch.randn(50, 80)

    def trained():
        experts.zero_grad()
        experts(x).square().sum().backward()
        return [p.grad.clone() for p in experts.parameters()]

    ours = trained()
    assert len(onednn) == 3 * (2 + 1 + 1)  # forward, one gradient of a wide weight, what the second layer reads
    with torch.backends.mkldnn.flags(enabled=False):
        plain = trained()
    assert len(onednn) == 12
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_what_needs_no_gradient_is_not_computed(onednn):
    x, weight = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(onednn) == 2
    assert x.grad is None


@pytest.mark.parametrize("case", ["double", "three", "eval", "autocast", "off", "small", "compiled"])
def test_torchs_own_elsewhere(onednn, monkeypatch, case):
    x, weight, bias = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    called = linear
    if case == "double":
        x, weight, bias = x.double(), weight.double(), bias.double()
    elif case == "three":
        x = x.expand(2, 6, 4)
    elif case == "small":
        monkeypatch.setattr(of_module, "LEAST", 6 * 4 * 5 + 1)
    elif case == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with (
        torch.set_grad_enabled(case != "eval"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
        torch.backends.mkldnn.flags(enabled=case != "off"),
    ):
        found, own = called(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(found, own)
    assert not onednn


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_only_of_amds_with_avx512(monkeypatch, tmp_path, vendor, capability, slow):
    about = tmp_path / "cpuinfo"
    about.write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(of_module, "Path", lambda _: about)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    of_module.mkl_is_slow.cache_clear()
    assert of_module.mkl_is_slow() is slow
    of_module.mkl_is_slow.cache_clear()
