# SPDX-License-Identifier: Apache-2.0
"""A rehearsal's executor: the site as it is deployed, but for its noise, which can be repeated and is not private.

Promises that every ledger line says so, which makes the site's ε infinite; no word of `veil site` leads here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flwr.clientapp import ClientApp

from veil.client.app import client_app
from veil.client.deployed import assemble
from veil.client.executor import main
from veil.client.site_file import read_site_file
from veil.common.exchange import RoundRequest
from veil.simulations.unprivate_noise import FixedNoise


def open_app(path: Path) -> ClientApp:
    """The ClientApp of a site file, with noise from each plan's own seed and without limits.

    Raises:
        VeilError: as `assemble`.
    """
    site = assemble(read_site_file(path))
    limits = site.policy.limits.model_copy(update={"epsilon_per_run": float("inf"), "epsilon_lifetime": float("inf")})

    def noise(request: RoundRequest) -> FixedNoise:
        return FixedNoise(request.plan.seed, site.policy.name, request.round)

    unlimited = site.policy.model_copy(update={"limits": limits})
    rehearsing = replace(site, policy=unlimited, noise=noise)
    return client_app(lambda context: rehearsing)


if __name__ == "__main__":
    main(open_app)
