import pytest

from app.cli.cluster import NothingToShow, _only_one

pytestmark = pytest.mark.unit


def test_without_an_address_there_must_be_one_cluster():
    assert _only_one(["127.0.0.1:1"]) == "127.0.0.1:1"
    with pytest.raises(NothingToShow, match="no Ray cluster"):
        _only_one([])
    with pytest.raises(NothingToShow, match=r"127\.0\.0\.1:1 or 127\.0\.0\.1:2"):
        _only_one(["127.0.0.1:1", "127.0.0.1:2"])
