# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.simulations.grid`: every message its reply, and threads for products only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from threadpoolctl import threadpool_info, threadpool_limits

from veil.simulations.grid import InProcessGrid


def app_of(answer: Callable[[int], int]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(str(context.node_config["partition-id"]))
        return Message(RecordDict({"config": ConfigRecord({"value": answer(partition)})}), reply_to=message)

    return app


def ask(grid: InProcessGrid) -> list[tuple[int, int]]:
    """Which node answered what."""
    messages = [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    return [(one.metadata.src_node_id, int(str(one.content.config_records["config"]["value"]))) for one in replies]


def test_every_node_answers_for_itself() -> None:
    grid = InProcessGrid(app_of(lambda partition: 10 * partition), 50)
    assert ask(grid) == [(node, 10 * place) for place, node in enumerate(grid.get_node_ids())]
    assert len(ask(grid)) == 50


def test_a_site_has_the_threads_it_is_given_for_its_products_and_the_setting_comes_back() -> None:
    """Threads in every small product would wait for one another; slow by a factor of ten on a busy machine."""

    def blas_threads() -> int:
        np.ones((2, 2)) @ np.ones((2, 2))
        return max(int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas")

    with threadpool_limits(limits=2, user_api="blas"):
        app = app_of(lambda _: blas_threads())
        assert {threads for _, threads in ask(InProcessGrid(app, 2))} == {1}
        assert {threads for _, threads in ask(InProcessGrid(app, 2, threads=2))} == {2}
        assert blas_threads() == 2
