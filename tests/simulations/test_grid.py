# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.simulations.grid`: every message its reply, sites side by side, one thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
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


def test_as_many_sites_work_at_once_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the others: one after the other, nobody would arrive."""
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    together = threading.Barrier(3, timeout=30)
    assert len(ask(InProcessGrid(app_of(lambda _: together.wait() * 0), 6))) == 6


def test_a_site_has_one_thread_for_its_products_and_the_setting_comes_back() -> None:
    """Threads of their own in every product would wait for one another; slow by a factor of ten on a busy machine."""

    def blas_threads() -> int:
        np.ones((2, 2)) @ np.ones((2, 2))
        return max(int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas")

    with threadpool_limits(limits=2, user_api="blas"):
        assert {threads for _, threads in ask(InProcessGrid(app_of(lambda _: blas_threads()), 2))} == {1}
        assert blas_threads() == 2
