# SPDX-License-Identifier: Apache-2.0
"""Boxes that a detector proposes for one image, against those that are there: matching, loss, and what was found.

Promises that an image's loss looks at that image alone, its own number of objects included (Carion et al. 2020).
"""

from __future__ import annotations

from typing import Final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from veil.common.truths import Box

NOTHING_WEIGHT: Final = 0.1
"""Weight of proposals that stand for nothing, of which an image has many."""

SIDES_WEIGHT: Final = 5.0
OVERLAP_WEIGHT: Final = 2.0

OVERLAP: Final = 0.5
"""Share of two boxes' union that they have in common for one to have found the other."""


def targets_of(boxes: tuple[Box, ...]) -> Tensor:
    """Label, left, top, right, bottom of each object, [objects, 5]."""
    return torch.tensor([[one.label, *one.sides] for one in boxes], dtype=torch.float32).reshape(-1, 5)


def sides(proposed: Tensor) -> Tensor:
    """Left, top, right, bottom from centre, width and height, [n, 4]."""
    centre, size = proposed[:, :2], proposed[:, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def overlaps(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Of all pairs: intersection over union, and how far apart they are besides (Rezatofighi et al. 2019), [n, m]."""
    left_top = torch.maximum(ours[:, None, :2], theirs[None, :, :2])
    right_bottom = torch.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    common = (right_bottom - left_top).clamp(min=0).prod(dim=2)
    union = _areas(ours)[:, None] + _areas(theirs)[None] - common
    first = torch.minimum(ours[:, None, :2], theirs[None, :, :2])
    hull = (torch.maximum(ours[:, None, 2:], theirs[None, :, 2:]) - first).clamp(min=0).prod(dim=2)
    return common / union.clamp(min=1e-6), (hull - union) / hull.clamp(min=1e-6)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def box_loss(scores: Tensor, proposed: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the labels, distance and overlap of the boxes, after the cheapest matching.

    Args:
        scores: of each proposal, [n, labels + 1], that of nothing last.
        proposed: centre, width and height from 0 to 1, [n, 4].
        target: `targets_of`.
    """
    ours, theirs, labels = sides(proposed), target[:, 1:], target[:, 0].long()
    chosen, of = _matched(scores.detach(), ours.detach(), theirs, labels)
    nothing = scores.shape[1] - 1
    right = torch.full((len(scores),), nothing)
    right[chosen] = labels[of]
    weight = torch.ones(nothing + 1)
    weight[nothing] = NOTHING_WEIGHT
    named = functional.cross_entropy(scores, right, weight=weight)
    if not len(chosen):
        return named
    shared, apart = overlaps(ours[chosen], theirs[of])
    far = (ours[chosen] - theirs[of]).abs().sum() * SIDES_WEIGHT
    outside = (1 - (shared - apart).diagonal()).sum() * OVERLAP_WEIGHT
    return named + (far + outside) / len(chosen)


def _matched(scores: Tensor, ours: Tensor, theirs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals and the objects that they stand for; a cost that is not finite is high."""
    shared, apart = overlaps(ours, theirs)
    far = torch.cdist(ours, theirs, p=1)
    cost = SIDES_WEIGHT * far - OVERLAP_WEIGHT * (shared - apart) - torch.softmax(scores, dim=1)[:, labels]
    chosen, of = linear_sum_assignment(torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=1e6).numpy())
    return torch.as_tensor(chosen), torch.as_tensor(of)


def seen(scores: Tensor, proposed: Tensor) -> list[tuple[int, float, list[float]]]:
    """Label, probability and sides of what is likelier to be there than not, the surest first."""
    chances = torch.softmax(scores.double(), dim=1)
    surest, label = chances.max(dim=1)
    found = [
        (int(label[place]), float(surest[place]), [round(float(side), 4) for side in box.clamp(0, 1)])
        for place, box in enumerate(sides(proposed))
        if int(label[place]) < scores.shape[1] - 1
    ]
    return sorted(found, key=lambda one: -one[1])


def found_shares(said: list[tuple[int, float, list[float]]], boxes: tuple[Box, ...]) -> tuple[float, float]:
    """Which part of the objects was found, and which part of what was said is there; 1 of nothing where nothing is."""
    left = list(boxes)
    for label, _, told in said:
        for one in left:
            shared, _ = overlaps(torch.tensor([told]), torch.tensor([one.sides]))
            if one.label == label and float(shared) >= OVERLAP:
                left.remove(one)
                break
    found = len(boxes) - len(left)
    return found / len(boxes) if boxes else 1.0, found / len(said) if said else float(not boxes)
