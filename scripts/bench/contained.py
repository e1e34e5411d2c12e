"""Runs a benchmark below a process that ends whatever it has left behind."""

from __future__ import annotations

import os
import sys
from typing import Final

_MARK: Final = "FRONTLINE_BENCH_CONTAINED"
GRACE_S: Final = 30.0


def contain(grace_s: float = GRACE_S) -> None:
    """Run this command once more below such a process and exit as it does; return in that run.

    Args:
        grace_s: how long what is left behind may take to end by itself, in seconds.
    """
    if _MARK in os.environ:
        return
    from scripts.contain import Containment

    os.environ[_MARK] = "1"
    sys.exit(Containment([sys.executable, *sys.argv], grace_s).run())
