"""How Python runs in an ingress's process, which serves requests and nothing else."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 10_000
"""How many new objects the collector lets come together before it looks through them.

Requests leave hardly any cycles: what it would find at Python's usual 700 is in use.
"""


def settle_in() -> None:
    """Prepare for requests, once everything is imported and known.

    What is there by then stays, and is several hundred thousand objects of Ray and Serve: no
    collection looks through them again, as every full one would while all requests wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
