# SPDX-License-Identifier: Apache-2.0
"""Apple's pfl simulator: federated averaging of the same head over the same sites and the same local steps.

Promises its nearest equivalent of a private run, which is less work than the others do: pfl knows no per-record
clipping, so each local step clips the batch's mean gradient, and the Gaussian mechanism clips each site's update and
adds noise once to their sum.
"""

from __future__ import annotations

import importlib.metadata
import time

import numpy as np
import torch
from contract import Workload, accuracy, answer, read_workload
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism
from torch import Tensor, nn


class Head(nn.Module):
    """A linear head with the two methods that pfl asks for."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return nn.functional.cross_entropy(self.linear(features), labels)

    def metrics(self, features: Tensor, labels: Tensor) -> dict[str, object]:
        """None: pfl evaluates in round 0 whatever is asked, and none of the others evaluates."""
        return {}


def simulate(work: Workload, head: Head, sites: list[Dataset]) -> float:
    """Run all rounds.

    Returns:
        seconds.
    """
    started = time.monotonic()
    model = PyTorchModel(
        model=head,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(head.parameters(), lr=1.0),
    )
    dataset = FederatedDataset(sites.__getitem__, get_user_sampler("minimize_reuse", list(range(work.sites))))
    gaussian = GaussianMechanism(clipping_bound=1.0, relative_noise_stddev=work.sigma)
    noise = [CentrallyAppliedPrivacyMechanism(gaussian)] if work.private else []
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=None, postprocessors=[WeightByUser(), *noise]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=work.learning_rate,
            local_batch_size=work.batch,
            local_max_grad_norm=work.max_grad_norm if work.private else None,
        ),
    )
    return round(time.monotonic() - started, 3)


def main() -> None:
    """Run the workload and answer."""
    work = read_workload()
    torch.set_num_threads(work.threads)
    torch.manual_seed(work.seed)
    np.random.seed(work.seed)
    features, labels = torch.from_numpy(np.array(work.read_features())), torch.from_numpy(work.read_labels())
    sites = [Dataset(raw_data=[features[work.rows(site)], labels[work.rows(site)]]) for site in range(work.sites)]
    head = Head(work.width, work.classes)
    seconds = simulate(work, head, sites)
    weight, bias = (part.detach().numpy() for part in head.parameters())
    answer(
        seconds=seconds,
        setup_s=None,
        client_rounds=work.client_rounds,
        wire_bytes=None,
        accuracy=accuracy(weight, bias, features.numpy(), labels.numpy()),
        version=f"pfl {importlib.metadata.version('pfl')}, torch {torch.__version__}",
    )


if __name__ == "__main__":
    main()
