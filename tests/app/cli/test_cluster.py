import pytest
import ray
from ray._private.utils import check_version_info

from app.cli.cluster import NothingToShow, connect, only_one

pytestmark = pytest.mark.unit


def test_without_an_address_there_must_be_one_cluster():
    assert only_one(["127.0.0.1:1"]) == "127.0.0.1:1"
    with pytest.raises(NothingToShow, match="no Ray cluster"):
        only_one([])
    with pytest.raises(NothingToShow, match=r"127\.0\.0\.1:1 or 127\.0\.0\.1:2"):
        only_one(["127.0.0.1:1", "127.0.0.1:2"])


def test_a_cluster_of_another_python_says_so(monkeypatch):
    def init(**_):
        check_version_info({"ray_version": ray.__version__, "python_version": "3.11.99"}, "here")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(NothingToShow, match=r"Python: 3\.11\.99 .* Use the environment"):
        connect("127.0.0.1:1")


def test_any_other_refusal_is_shown_with_what_ray_says(monkeypatch):
    def init(**_):
        raise ConnectionError("nobody\n  listens")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(NothingToShow, match=r"does it run, .*\(nobody listens\)"):
        connect("127.0.0.1:1")
