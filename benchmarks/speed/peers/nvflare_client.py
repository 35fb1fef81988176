# SPDX-License-Identifier: Apache-2.0
"""What one site of the NVFlare simulation runs: the client script of its examples, with Opacus where private.

Promises the same local pass as flower_app.py.
"""

from __future__ import annotations

import sys
import warnings

import nvflare.client as flare
import torch
from contract import Workload, read_workload
from nvflare.apis.fl_constant import FLMetaKey
from nvflare_model import Head
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


def passed(work: Workload, head: Head, site: int) -> None:
    """One pass over the site's records."""
    rows = work.rows(site)
    features, labels = torch.from_numpy(work.read_features()[rows].copy()), torch.from_numpy(work.read_labels()[rows])
    loader = DataLoader(TensorDataset(features, labels), batch_size=work.batch, shuffle=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=work.learning_rate)
    model: nn.Module = head
    if work.private:
        from opacus import PrivacyEngine

        model, optimizer, loader = PrivacyEngine(secure_mode=False).make_private(
            module=head,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=work.sigma,
            max_grad_norm=work.max_grad_norm,
        )
    criterion = nn.CrossEntropyLoss()
    model.train()
    for inputs, truth in loader:
        optimizer.zero_grad()
        criterion(model(inputs), truth).backward()
        optimizer.step()


def main() -> None:
    """Serve rounds for as long as the simulator asks."""
    work = read_workload(sys.argv[1])
    torch.set_num_threads(1)
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        head = Head(work.width, work.classes)
        head.load_state_dict({name: torch.as_tensor(value) for name, value in received.params.items()})
        passed(work, head, site)
        meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: work.local_steps}
        flare.send(flare.FLModel(params=head.state_dict(), meta=meta))


if __name__ == "__main__":
    main()
