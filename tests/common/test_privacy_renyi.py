# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.privacy.renyi`: divergences against the integral and another implementation, and the tail."""

from __future__ import annotations

import math
from itertools import pairwise

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from scipy.integrate import quad
from scipy.special import log_ndtr

from veil.common.privacy.renyi import FILTER_ORDERS, ORDERS, epsilon_at, renyi


def integrated(sigma: float, q: float, order: int, *, adding: bool) -> float:
    """D(α) of one release by quadrature, in one direction of the add-or-remove relation."""

    def log_ratio(x: float) -> float:
        return float(np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2)))

    def integrand(x: float) -> float:
        log_normal = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
        return math.exp(log_normal + (1 - order if adding else order) * log_ratio(x))

    edges = sorted({-12 * sigma, 0.0, 0.5, 1.0, float(order), order + 12 * sigma})
    total = sum(quad(integrand, low, high, epsabs=0, epsrel=1e-12, limit=400)[0] for low, high in pairwise(edges))
    return math.log(total) / (order - 1)


@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.01), (1.0, 0.1), (2.0, 0.5), (5.0, 0.9)])
@pytest.mark.parametrize("order", [2, 5, 20])
def test_the_larger_of_both_directions(sigma: float, q: float, order: int) -> None:
    found = renyi(sigma, q)[ORDERS.index(order)]
    assert found == pytest.approx(integrated(sigma, q, order, adding=False), rel=1e-8)
    assert found >= integrated(sigma, q, order, adding=True) * (1 - 1e-9)


@pytest.mark.parametrize(("sigma", "q"), [(0.3, 1e-5), (0.3, 0.999), (1.0, 0.032), (5.0, 0.5), (50.0, 1e-2)])
def test_dp_accounting_agrees(sigma: float, q: float) -> None:
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    accountant = rdp.RdpAccountant(orders=list(ORDERS))
    accountant.compose(event, 1)
    np.testing.assert_allclose(renyi(sigma, q), accountant._rdp, rtol=1e-9)
    assert epsilon_at(renyi(sigma, q), 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize(("sigma", "q"), [(1e6, 1e-3), (1e6, 1e-9), (1e3, 1e-9), (50.0, 1e-5)])
def test_the_smallest_costs_do_not_cancel(sigma: float, q: float) -> None:
    """α·q²·(exp(1/σ²) − 1)/2 to first order; there dp-accounting's sum has no digit left, and goes below zero."""
    second = renyi(sigma, q)[ORDERS.index(2)]
    assert second == pytest.approx(math.log1p(q**2 * math.expm1(sigma**-2)), rel=1e-9)
    assert all(renyi(sigma, q) > 0)


@pytest.mark.parametrize(("sigma", "q"), [(0.3, 0.9999999), (0.3, 1e-300), (1e6, 1e-300), (1e6, 0.5)])
def test_the_edges_of_the_range_are_numbers(sigma: float, q: float) -> None:
    found = renyi(sigma, q)
    assert all(np.isfinite(found)) and all(found >= 0)
    assert all(found <= np.array(ORDERS) / (2 * sigma**2) * (1 + 1e-9))


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.7, 6.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_the_tail_holds_for_a_gaussian(mu: float, delta: float) -> None:
    """δ of the exact Gaussian at the ε found is below δ; at nine tenths of it, for a cost worth the name, it is not."""
    epsilon = epsilon_at(np.array(ORDERS) * mu**2 / 2, delta)

    def exact(at: float) -> float:
        return math.exp(log_ndtr(mu / 2 - at / mu)) - math.exp(at + log_ndtr(-mu / 2 - at / mu))

    assert exact(epsilon) <= delta
    assert mu < 0.1 or exact(0.8 * epsilon) > delta


def test_fewer_orders_only_raise_the_figure() -> None:
    divergences = 300 * renyi(1.0, 0.032)
    assert set(FILTER_ORDERS) <= set(ORDERS)
    assert epsilon_at(divergences, 1e-5, FILTER_ORDERS) >= epsilon_at(divergences, 1e-5)
    assert epsilon_at(np.zeros(len(ORDERS)), 0.5) == 0.0
