# SPDX-License-Identifier: Apache-2.0
"""The tuned model as a folder in Hugging Face layout: written, read back, and asked.

Promises that the folder needs nothing but torch and transformers, holds no pickle, and that its file of facts
(`veil.json`) names plan, labels and how features become the head's input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError, PlanError
from veil.common.head import CENTRE, HEAD_FILE, INTERCEPT, predict
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED, Backbone, Form
from veil.common.update import Adapter
from veil.common.weights import fingerprint
from veil.server.anomaly import ANOMALY_FILE, AnomalyModel

if TYPE_CHECKING:
    from veil.common.lazy_backbone import LazyBackbone

_FACTS = "veil.json"
_OUTPUTS: Mapping[Form, str] = {
    "classification": "softmax(input @ head.weight.T)",
    "multilabel": "sigmoid(input @ head.weight.T), each label's own probability",
    "regression": "sigmoid(input @ head.weight.T), where the number lies in plan.task.target, 0 low and 1 high",
    "tokens": "softmax(input @ head.weight.T) of the first token of each word",
    "answers": "softmax over the tokens of input @ head.weight.T: where the answer starts and where it ends",
    "generation": "the model's own head over its vocabulary; head.weight has no rows",
    "detection": "softmax(input @ head.weight.T) of each detection token, nothing last; boxes are the model's own",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedModel:
    """A backbone with its tuned head.

    Attributes:
        plan: the public plan it was tuned by.
        adapter: the head, the centre, and what was tuned below them.
        backbone: None for numeric features.
        anomaly: the distribution of the training records' unit rows; None of a run that released no moments.
    """

    plan: RunPlan
    adapter: Adapter
    backbone: LazyBackbone | None
    anomaly: AnomalyModel | None = None

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
        if self.anomaly is not None:
            (folder / ANOMALY_FILE).write_bytes(self.anomaly.to_bytes())
        facts = {
            "plan": json.loads(self.plan.public().to_json()),
            "plan_sha256": self.plan.sha256,
            "labels": list(self.labels),
            "head": {
                "input": "unit(unit(features) - centre), then the intercept constant appended, then unit",
                "intercept": INTERCEPT,
                "output": _OUTPUTS[self.plan.task.form],
            },
        }
        (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def _name_labels(self, path: Path) -> None:
        if self.plan.task.form in STRUCTURED - {"tokens"}:
            return
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
            inside = folder / "model"
            raise InputError(
                f"{folder} ({'not there' if not folder.exists() else type(error).__name__})",
                f"a model folder with {_FACTS} and {HEAD_FILE}",
                f"give {inside}" if (inside / _FACTS).exists() else "give the folder `model` of a finished run",
            ) from None
        anomaly = _read_anomaly(folder / ANOMALY_FILE, adapter)
        backbone = None
        if plan.backbone is not None:
            from veil.common.lazy_backbone import find_backbone

            source = f"path:{folder.resolve()}"
            pinned = Backbone(source=source, sha256=fingerprint(source, base=folder).sha256)
            backbone = find_backbone(pinned, plan.task, base=folder)
        return cls(plan=plan, adapter=adapter, backbone=backbone, anomaly=anomaly)

    def predict(
        self,
        inputs: Sequence[str] | Sequence[Path] | NDArray[np.floating],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Answers to texts, paths of images or sounds, or rows of features, each from 0 to 1, [n, labels]: see
        `veil.common.head.predict`."""
        form = self.plan.task.form
        if isinstance(inputs, np.ndarray):
            return predict(self.adapter, inputs, form)
        if self.backbone is None:
            raise InputError("text or image input", "numeric features, as the model has no backbone", "give a table")
        if self.plan.transfer.deep:
            from veil.common.tunable import load_tunable

            model = load_tunable(self.backbone, self.plan)
            with model.at(self.adapter):
                return model.probabilities(inputs, advance=advance)
        return predict(self.adapter, self.features(inputs, advance=advance), form)

    def features(
        self,
        inputs: Sequence[str] | Sequence[Path] | NDArray[np.floating],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> NDArray[np.floating]:
        """What the frozen backbone makes of texts or paths, [n, d]; rows of features as they are."""
        if isinstance(inputs, np.ndarray):
            return inputs
        if self.backbone is None:
            raise InputError("text or image input", "numeric features, as the model has no backbone", "give a table")
        return self.backbone.encode(inputs, advance=advance)

    def distribution(self) -> AnomalyModel:
        """Of the training records' unit rows.

        Raises:
            InputError: when the run released none.
        """
        if self.anomaly is None:
            training, mode = self.plan.training, self.plan.transfer.mode
            how = f'transfer.mode = "{mode}"' if self.plan.transfer.deep else f'algorithm = "{training.algorithm}"'
            raise InputError(
                f"anomaly scores of a model trained with {how}, in whose folder no {ANOMALY_FILE} is",
                "a model of a run whose sites released the second moments of their features",
                'train a head on frozen features with training.algorithm = "one-shot"',
            )
        return self.anomaly

    def say(
        self, inputs: Sequence[str] | Sequence[Path], *, advance: Callable[[int], None] | None = None
    ) -> list[dict[str, Any]]:
        """Answers with a structure, an object a record: `labels` of words, an `answer`, a `text`, or `boxes`."""
        if self.backbone is None:
            raise InputError("text or image input", "numeric features, as the model has no backbone", "give a table")
        from veil.common.tunable import load_tunable

        model = load_tunable(self.backbone, self.plan)
        with model.at(self.adapter):
            return model.answers(inputs, advance=advance)


def _read_anomaly(path: Path, adapter: Adapter) -> AnomalyModel | None:
    """None where there is no such file."""
    try:
        found = AnomalyModel.from_bytes(path.read_bytes())
        if found.mean.shape != adapter.tensors[CENTRE].shape:
            raise ValueError(f"a mean of {found.mean.size} features")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} ({error})", "the distribution that the run left there", "restore the model's folder, or remove it"
        ) from None
    return found
