import pytest

from deployments.control.telemetry import ReplicaCounts

pytestmark = pytest.mark.unit


def counts(*looks):
    made = ReplicaCounts()
    for ready, failing in looks:
        made.look("pool", frozenset(ready), failing)
    return made.starts["pool"], made.losses["pool"]


@pytest.mark.parametrize(
    ("looks", "starts", "losses"),
    [
        ([("ab", 0)], 0, 0),  # they were there before this Model
        ([("", 0), ("ab", 0)], 2, 0),
        ([("ab", 0), ("a", 1), ("a", 1), ("ac", 0)], 1, 1),  # one engine ended
        ([("ab", 0), ("a", 0)], 0, 0),  # one was told to stop
        ([("ab", 0), ("", 2)], 0, 2),
        ([("a", 0), ("a", 3)], 0, 0),  # others have not become ready
    ],
)
def test_a_replica_is_lost_if_serve_still_runs_it(looks, starts, losses):
    assert counts(*looks) == (starts, losses)
