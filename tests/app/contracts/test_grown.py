import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import ModelSettings
from app.contracts.stats import ModelBoard
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.core.dialect import Dialect

pytestmark = pytest.mark.unit

SNAPSHOT = ModelSnapshot("m", (), "me", 0, ModelSettings(), ())
BOARD = ModelBoard(SNAPSHOT, ())
REPLICA = ReplicaStatus("r", "pool", "http://x", "key", 8, "1", None, Dialect("vllm"))
NEEDED = {ModelSnapshot: 6, ModelBoard: 2, ReplicaStatus: 8}


@given(st.sampled_from([SNAPSHOT, BOARD, REPLICA]), st.data())
def test_a_message_of_another_version_is_read_with_defaults(message, data):
    """81c90fb: whoever read a field that the sender did not know raised an AttributeError."""
    state = message.__getstate__()
    sent = data.draw(st.integers(NEEDED[type(message)], len(state) + 2))
    received = type(message).__new__(type(message))
    received.__setstate__([*state, "new", "newer"][:sent])
    assert received == message


def test_it_is_pickled_as_before():
    assert pickle.loads(pickle.dumps(BOARD)) == BOARD
