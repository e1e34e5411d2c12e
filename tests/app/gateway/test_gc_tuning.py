"""In a process of its own: what it sets is set for the whole of it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

COLLECTING = """
import gc
from app.gateway.gc_tuning import YOUNG, settle_in
kept = [[n] for n in range(1000)]
settle_in()
print(gc.get_freeze_count() > 1000, gc.get_threshold()[0] == YOUNG, len(gc.get_objects()) < 1000)
"""


def test_what_is_there_when_service_begins_is_not_looked_through_again():
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "True True True", done.stderr
