# SPDX-License-Identifier: Apache-2.0
"""Where the apps run: in this process, in several, or on Flower's Ray engine.

Promises that all engines run the same ServerApp and the same ClientApp.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from veil.common.errors import InputError, RunError, VeilError
from veil.simulations.engines import Engine
from veil.simulations.grid import RUN_ID, InProcessGrid
from veil.simulations.process_grid import ProcessGrid


def check_engine(engine: Engine) -> None:
    """Refuse Ray where it is not installed, and processes where they cannot be forked.

    Raises:
        InputError: with the remedy.
    """
    if engine is Engine.PROCESSES and "fork" not in multiprocessing.get_all_start_methods():
        raise InputError("--engine processes", "a system that forks processes", "use --engine inprocess or ray")
    if engine is Engine.RAY and importlib.util.find_spec("ray") is None:
        raise InputError(
            "--engine ray",
            "Ray to be installed",
            "make install-dev (or pip install the extra veil[ray]), or use --engine inprocess",
        )


def run_apps(
    engine: Engine,
    server_app: ServerApp,
    client_app: ClientApp,
    sites: int,
    *,
    threads: int,
    begin: Callable[[int], None],
) -> None:
    """Run one federation to its end.

    Args:
        engine: where.
        server_app: the coordinator's.
        client_app: the sites'.
        sites: how many there are.
        threads: for a site's matrix products, in this process.
        begin: called first in each of several processes, with its number.

    Raises:
        VeilError: whatever stopped the run.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if engine is Engine.RAY:
        _run_on_ray(server_app, client_app, sites)
        return
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config={})
    if engine is Engine.PROCESSES:
        with ProcessGrid(client_app, sites, processes=os.cpu_count() or 1, begin=begin) as grid:
            server_app(grid, context)
    else:
        server_app(InProcessGrid(client_app, sites, threads=threads), context)


def _run_on_ray(server_app: ServerApp, client_app: ClientApp, sites: int) -> None:
    """Flower's own engine; an existing cluster is used when RAY_ADDRESS names it."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from flwr.simulation import run_simulation

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(
                server_app,
                client_app,
                num_supernodes=sites,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": {"logging_level": logging.ERROR, "log_to_driver": False},
                },
            )
    except VeilError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"Flower's Ray engine stopped ({error})",
            "a run to its end",
            "look at the lines above, or use --engine inprocess",
        ) from error
