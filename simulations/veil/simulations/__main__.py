# SPDX-License-Identifier: Apache-2.0
"""`python -m veil.simulations` is the `veil` command.

Promises nothing that `cli` does not.
"""

from veil.simulations.cli import main

main()
