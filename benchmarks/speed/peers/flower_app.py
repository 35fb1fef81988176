# SPDX-License-Identifier: Apache-2.0
"""A Flower app that trains a linear head, in the manner of Flower's example for Opacus.

Promises what that example does: each round each client builds its model, wraps it with `make_private`, passes once
over its records, returns weights, and the server averages. It is kinder than the example where that helps Flower:
records and backbone are loaded once per worker, and only the head travels. On notes each client evaluates each round's
head on its held-out notes, as in the example; SPEED_EVALUATE=no leaves that out.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings

import torch
from contract import Workload, read_workload
from encoder import Encoder, load_encoder, tokenize
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("opacus").setLevel(logging.ERROR)


@functools.cache
def workload() -> Workload:
    """What this run is about; Ray's workers inherit the variable."""
    return read_workload(os.environ["SPEED_WORKLOAD"])


@functools.cache
def records() -> tuple[Tensor, ...]:
    """Inputs of all records, then their labels, once per worker process."""
    work = workload()
    labels = torch.from_numpy(work.read_labels())
    if work.features is not None:
        return torch.from_numpy(work.read_features()), labels
    return *tokenize(work.read_notes(), str(work.backbone), work.max_length), labels


@functools.cache
def held_out() -> tuple[Tensor, ...]:
    """Tokens and mask of all held-out notes, then their labels, once per worker process."""
    work = workload()
    texts, labels = work.read_test()
    return *tokenize(texts, str(work.backbone), work.max_length), torch.tensor(labels)


def evaluates() -> bool:
    """Whether clients evaluate: the notes' do, where nothing says otherwise."""
    return workload().features is None and os.environ.get("SPEED_EVALUATE") != "no"


@functools.cache
def backbone() -> Encoder:
    """The frozen encoder, once per worker process."""
    return load_encoder(str(workload().backbone))


class Classifier(nn.Module):
    """A linear head on features, or on what the frozen backbone makes of tokens."""

    def __init__(self, width: int, classes: int, encoder: Encoder | None) -> None:
        super().__init__()
        self.encode = [encoder] if encoder is not None else []  # in a list: not a submodule, so it does not travel
        self.head = nn.Linear(width, classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        features = self.encode[0](*inputs) if self.encode else inputs[0]
        scores: Tensor = self.head(features)
        return scores


def new_model() -> Classifier:
    """The model every client starts a round with; its weights are then set."""
    work = workload()
    model = Classifier(work.width, work.classes, backbone() if work.features is None else None)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of one client."""
    work = workload()
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = work.rows(int(context.node_config["partition-id"]))
    loader = DataLoader(TensorDataset(*(part[rows] for part in records())), batch_size=work.batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=work.learning_rate)
    metrics = {"num-examples": float(rows.stop - rows.start)}
    if work.private:
        metrics["epsilon"] = _private_pass(model, optimizer, loader) or 0.0
    else:
        _pass(model, optimizer, loader)
    arrays = ArrayRecord(model.state_dict())
    metrics["bytes"] = float(sum(len(array.data) for array in arrays.values()))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss and accuracy of one client's held-out notes."""
    work = workload()
    model = new_model().eval()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    site = int(context.node_config["partition-id"])
    rows = slice(work.test_offsets[site], work.test_offsets[site + 1])
    *inputs, labels = (part[rows] for part in held_out())
    loss, correct = 0.0, 0
    with torch.no_grad():
        for batch in zip(*(part.split(work.batch) for part in (*inputs, labels)), strict=True):
            scores = model(*batch[:-1])
            loss += float(nn.functional.cross_entropy(scores, batch[-1], reduction="sum"))
            correct += int((scores.argmax(1) == batch[-1]).sum())
    many = len(labels)
    metrics = MetricRecord({"num-examples": float(many), "loss": loss / many, "accuracy": correct / many})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _private_pass(
    model: Classifier, optimizer: torch.optim.Optimizer, loader: DataLoader[tuple[Tensor, ...]]
) -> float | None:
    """One pass with Opacus, set up anew, and the round's own ε as in the example, unless SPEED_EPSILON says no."""
    from opacus import PrivacyEngine

    engine = PrivacyEngine(secure_mode=False)
    wrapped, private, batches = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=workload().sigma,
        max_grad_norm=workload().max_grad_norm,
    )
    _pass(wrapped, private, batches)
    if os.environ.get("SPEED_EPSILON") == "no":
        return None
    return float(engine.get_epsilon(delta=1e-5))


def _pass(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[tuple[Tensor, ...]]) -> None:
    criterion = nn.CrossEntropyLoss()
    model.train()
    for *inputs, labels in loader:
        optimizer.zero_grad()
        criterion(model(*inputs), labels).backward()
        optimizer.step()
