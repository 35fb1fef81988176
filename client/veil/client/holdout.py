# SPDX-License-Identifier: Apache-2.0
"""Which of a site's units never train, so that a model can be judged on them.

Promises that the choice is a keyed hash of the unit's own name or content alone: it is the same in every run of the
site with the same part, and no other unit that comes or goes can change it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veil.client.examples import Examples

_PURPOSE = b"held out"


def identities(examples: Examples) -> NDArray[np.str_]:
    """What each record is chosen by: its patient, else a hash of its own text, image or numbers; [n].

    Not its place in the table: one record more would move all those after it between training and evaluation.
    """
    if examples.patients is not None:
        return examples.patients
    return np.array([hashlib.sha256(content).hexdigest() for content in _contents(examples)], dtype=np.str_)


def held_out(names: NDArray[np.str_], key: bytes, part: float) -> NDArray[np.bool_]:
    """Which records are held out, [n]; all of one name are, or none.

    Args:
        names: from `identities`, [n].
        key: the site's secret key.
        part: chance of a name to be held out.
    """
    distinct, of_record = np.unique(names, return_inverse=True)
    purpose = hmac.new(key, _PURPOSE, hashlib.sha256).digest()
    places = [_place(purpose, str(name)) for name in distinct]
    chosen: NDArray[np.bool_] = (np.array(places, dtype=np.float64) < part)[of_record]
    return chosen


def _place(key: bytes, name: str) -> float:
    """A name's place in [0, 1)."""
    digest = hmac.new(key, name.encode(), hashlib.sha256).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def _contents(examples: Examples) -> Iterator[bytes]:
    for record in examples.inputs:
        if isinstance(record, Path):
            yield record.read_bytes()
        else:
            yield record.encode() if isinstance(record, str) else record.tobytes()
