# SPDX-License-Identifier: Apache-2.0
"""The study of accuracy: the step it attributes to Opacus is Opacus' own, and its page says what was measured."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from veil.client.units import Units
from veil.common.privacy import PrivacyBudget

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BUDGET = PrivacyBudget(target_epsilon=3.0, target_delta=1e-5)
SEED = 11


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/fedavg_opacus.py, which is not installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fedavg_opacus")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/accuracy_page.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accuracy_page")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/accuracy_rows.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accuracy_rows")


def local_site(peer: ModuleType, *, count: int) -> Any:
    """70 random records of so many units, and batches of 16 of them."""
    held = units(records=70, count=count)
    order = np.argsort(held.unit, kind="stable")
    return peer.LocalSite(
        inputs=peer.with_bias(held.features[order]),
        labels=held.labels[order],
        starts=np.concatenate([[0], np.cumsum(held.sizes)]),
        sigma=1.5,
        sample_rate=1 / -(-count // 16),
        steps=-(-count // 16),
    )


def units(*, records: int, count: int) -> Units:
    """Random records of so many units, each with at least one."""
    rng = np.random.default_rng(SEED)
    owner = np.concatenate([np.arange(count), rng.integers(0, count, records - count)])
    return Units(
        features=rng.standard_normal((records, 6)), labels=rng.integers(0, 3, records), unit=owner, count=count
    )


def opacus_step(
    weight: NDArray[np.float32], site: Any, chosen: NDArray[np.int64], settings: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One step of `make_private`'s optimizer on chosen units, and the standard normal noise that it drew.

    Units of several records have their per-record gradients averaged before the optimizer clips.
    """
    inputs, labels, first = site.drawn(chosen)
    head = torch.nn.Linear(weight.shape[1] - 1, len(weight))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight[:, :-1]))
        head.bias.copy_(torch.from_numpy(weight[:, -1]))
    records = TensorDataset(torch.zeros(site.units, head.in_features))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, loader = PrivacyEngine().make_private(
            module=head,
            optimizer=torch.optim.SGD(head.parameters(), lr=settings.learning_rate),
            data_loader=DataLoader(records, batch_size=settings.batch),
            noise_multiplier=site.sigma,
            max_grad_norm=settings.max_grad_norm,
            noise_generator=torch.Generator().manual_seed(SEED),
        )
        assert len(loader) == site.steps
        scores = private(torch.from_numpy(inputs[:, :-1].copy()))
        torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)).backward()
        sizes = torch.from_numpy(np.diff(np.append(first, len(labels))))
        owner = torch.repeat_interleave(torch.arange(len(first)), sizes)
        part: Any  # Opacus puts a gradient per record beside each parameter
        for part in head.parameters():
            sums = torch.zeros(len(first), *part.shape).index_add_(0, owner, part.grad_sample)
            part.grad_sample = sums / sizes.reshape(-1, *[1] * part.dim())
        optimizer.step()
    again = torch.Generator().manual_seed(SEED)
    drawn = [torch.normal(0.0, 1.0, tuple(part.shape), generator=again).numpy() for part in head.parameters()]
    moved = np.hstack([head.weight.detach().numpy(), head.bias.detach().numpy()[:, None]])
    return moved, np.hstack([drawn[0], drawn[1][:, None]])


@pytest.mark.parametrize("count", [70, 40], ids=["a record a unit", "several records a unit"])
@pytest.mark.parametrize("bound", [0.3, 1.0, 3.0])
def test_the_step_is_the_step_of_opacus(peer: ModuleType, count: int, bound: float) -> None:
    """The same weights after clipping, noise, division by the expected batch and the SGD step."""
    settings = peer.Settings(batch=16, max_grad_norm=bound)
    site = local_site(peer, count=count)
    weight = np.random.default_rng(SEED).standard_normal((3, 7)).astype(np.float32)
    chosen = np.arange(0, count, 3)

    expected, noise = opacus_step(weight, site, chosen, settings)
    found = peer.private_step(weight, *site.drawn(chosen), noise=noise, site=site, settings=settings)

    assert np.abs(expected - weight).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_empty_batch_is_noise_alone(peer: ModuleType) -> None:
    """A Poisson batch without units moves the weights by the noise, and by nothing else."""
    settings = peer.Settings(batch=16)
    site = local_site(peer, count=70)
    weight, noise = np.zeros((3, 7), np.float32), np.ones((3, 7), np.float32)

    found = peer.private_step(weight, *site.drawn(np.zeros(0, np.int64)), noise=noise, site=site, settings=settings)

    np.testing.assert_allclose(found, -site.sigma / site.batch * noise, rtol=1e-6)


def test_noise_is_for_all_steps_of_the_run(peer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """σ is asked for once, for every step of every round at the loader's rate, not for a round."""
    asked = []

    def calibrated(*promise: object) -> float:
        asked.append(promise)
        return 2.5

    monkeypatch.setattr(peer, "calibrated", calibrated)
    settings = peer.Settings(rounds=10, local_epochs=2, batch=16)

    site = peer.local_site(units(records=70, count=70), BUDGET, settings)

    assert asked == [(BUDGET, 10 * 2 * 5, 1 / 5)]
    assert (site.sigma, site.steps, site.batch) == (2.5, 5, 14)


def test_the_page_tells_what_missed_its_aim(page: ModuleType, rows: ModuleType, tmp_path: Path) -> None:
    """Means and spreads over seeds, an aim that is missed by name, and the speed part untouched."""
    (tmp_path / "RESULTS.template.md").write_text(
        "{{accuracy}}\n{{aims}}\n<!-- speed -->\n{{speed}}\n<!-- /speed -->\n"
    )
    (tmp_path / "RESULTS.md").write_text("<!-- speed -->\nfast\n<!-- /speed -->\n")
    runs = [
        rows.Run(set="sst2", division="iid", method=method, epsilon=3.0, seed=seed, accuracy=level + seed, units=[250])
        for method, level in (("veil-local", 70.0), ("fedavg-opacus", 71.5))
        for seed in range(3)
    ]

    page.save(runs, tmp_path)

    written = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| 72.5 ± 1.0 |" in written
    assert "| local noise never below usual FedAvg + Opacus | no | sst2 at 3: -1.5 ± 0.0 |" in written
    assert "<!-- speed -->\nfast\n<!-- /speed -->" in written
