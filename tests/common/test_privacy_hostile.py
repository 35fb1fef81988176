# SPDX-License-Identifier: Apache-2.0
"""A hostile plan cannot kill the agent: its cost is known within bounded memory and processor time.

The limits are the kernel's, set on a process of their own, so that what passes them fails and nothing is timed.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

SECONDS = 60
"""Processor time; the dearest plan below takes some ten."""

MEMORY = 2 * 2**30
"""Address space beyond what the imports take."""

PROGRAM = """
import resource, sys
from veil.common.privacy import Mechanism, PrivacyBudget, calibrate, spent, spent_over_runs

def release(sigma, rate=1.0, steps=1):
    return Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=rate, steps=steps)

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
epsilon = eval(sys.argv[1])
assert epsilon >= 0, epsilon
print(epsilon)
"""

PLANS = {
    "as many steps as can be, little noise": "spent([release(0.3, q, 10**6) for q in (1.0, 0.5, 0.1)], 1e-5).epsilon",
    "thousands of different samples": "spent([release(1 + k / 1e4, 1e-3) for k in range(4000)], 1e-5).epsilon",
    "thousands of different runs": "spent_over_runs([[release(1 + k / 1e4, 1e-3)] for k in range(4000)], 1e-5).epsilon",
    "as many steps as can be, just below the limit": "spent([release(0.5, 1e-3, 10**6)], 1e-5).epsilon",
    "next to nothing, forever": "spent([release(1e6, 1e-9, 10**6)] * 1000, 1e-5).epsilon",
    "least and most noise at once": "spent([release(0.3, 1e-5, 10**5), release(1e6, 0.9, 10**6)], 1e-5).epsilon",
    "a promise of a thousand": "spent([calibrate(PrivacyBudget(target_epsilon=1e3, target_delta=1e-5), steps=10**6,"
    " sample_rate=0.5, max_grad_norm=1.0)], 1e-5).epsilon",
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_hostile_plan_is_answered_within_bounds(plan: str) -> None:
    done = _answer(plan)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) >= 0


def test_the_bounds_bind() -> None:
    """What takes more memory does not get it: the test above can fail."""
    assert "MemoryError" in _answer("float(len(bytearray(3 * 2**30)))").stderr


def _answer(expression: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, expression, str(MEMORY)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
    )
