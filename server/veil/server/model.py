# SPDX-License-Identifier: Apache-2.0
"""The tuned model as a folder in Hugging Face layout: written, read back, and asked.

Promises that the folder needs nothing but torch and transformers, holds no pickle, and that its file of facts
(`veil.json`) names plan, labels and how features become the head's input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError, PlanError
from veil.common.head import INTERCEPT, predict
from veil.common.plan import Backbone, RunPlan
from veil.common.update import Adapter
from veil.common.weights import fingerprint

if TYPE_CHECKING:
    from veil.common.lazy_backbone import LazyBackbone

HEAD_FILE = "head/head.safetensors"
"""The tuned part, in a model's folder."""

_FACTS = "veil.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedModel:
    """A backbone with its tuned head.

    Attributes:
        plan: the public plan it was tuned by.
        adapter: the head and the centre.
        backbone: None for numeric features.
    """

    plan: RunPlan
    adapter: Adapter
    backbone: LazyBackbone | None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the head's rows."""
        return self.plan.task.labels

    def save(self, folder: Path) -> None:
        """Write the folder.

        Args:
            folder: a new folder.
        """
        folder.mkdir(parents=True)
        if self.backbone is not None:
            self.backbone.save(folder)
            self._name_labels(folder / "config.json")
        (folder / HEAD_FILE).parent.mkdir()
        (folder / HEAD_FILE).write_bytes(self.adapter.to_bytes())
        facts = {
            "plan": json.loads(self.plan.public().to_json()),
            "plan_sha256": self.plan.sha256,
            "labels": list(self.labels),
            "head": {
                "input": "unit(unit(features) - centre), then the intercept constant appended, then unit",
                "intercept": INTERCEPT,
                "output": "softmax(input @ head.weight.T)",
            },
        }
        (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def _name_labels(self, path: Path) -> None:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["id2label"] = {str(index): label for index, label in enumerate(self.labels)}
        config["label2id"] = {label: index for index, label in enumerate(self.labels)}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TunedModel:
        """Read a folder that `save` wrote.

        Raises:
            InputError: when it is not one.
        """
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            plan = RunPlan.from_json(json.dumps(facts["plan"]))
            adapter = Adapter.from_bytes((folder / HEAD_FILE).read_bytes())
        except (OSError, ValueError, KeyError, PlanError) as error:
            raise InputError(
                f"{folder} ({type(error).__name__})",
                f"a model folder with {_FACTS} and {HEAD_FILE}",
                "give the folder `model` of a finished run",
            ) from None
        backbone = None
        if plan.backbone is not None:
            from veil.common.lazy_backbone import find_backbone

            source = f"path:{folder.resolve()}"
            pinned = Backbone(source=source, sha256=fingerprint(source, base=folder).sha256)
            backbone = find_backbone(pinned, plan.task, base=folder)
        return cls(plan=plan, adapter=adapter, backbone=backbone)

    def predict(
        self,
        inputs: Sequence[str] | Sequence[Path] | NDArray[np.floating],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Class probabilities of texts, image paths or rows of features, [n, classes]."""
        if isinstance(inputs, np.ndarray):
            return predict(self.adapter, inputs)
        if self.backbone is None:
            raise InputError("text or image input", "numeric features, as the model has no backbone", "give a table")
        return predict(self.adapter, self.backbone.encode(inputs, advance=advance))
