"""Tunes Python's garbage collector for the process of an ingress."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 10_000
"""The collector's threshold for the youngest generation, in new objects.

Requests leave hardly any cycles. At Python's default of 700 the collector would find almost only
objects that are still in use.
"""


def settle_in() -> None:
    """Freeze the heap and set the threshold, once all modules are imported and models are known.

    By then there are several hundred thousand objects of Ray and Serve, which stay for good. Frozen
    objects are not scanned again; otherwise every full collection would scan them while all
    requests wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
