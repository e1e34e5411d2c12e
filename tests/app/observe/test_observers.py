import pytest

from app import alarms
from app.observe.observers import Observers, Refused

pytestmark = pytest.mark.unit

REFUSED = Refused("req_1", "chat/completions", "", 401, "invalid_api_key")


class Seen:
    def __init__(self):
        self.requests = []

    def ended(self, request):
        self.requests.append(request)

    refused = ended


class Broken:
    def ended(self, request):
        raise ValueError

    refused = ended


def test_an_observer_that_fails_is_alarmed_and_the_others_are_told():
    before, seen = alarms.PROCESS.counts().get("observer", 0), Seen()
    observers = Observers(Broken())
    observers.add(seen)
    observers.refused(REFUSED)
    observers.ended("anything")
    assert seen.requests == [REFUSED, "anything"]
    assert alarms.PROCESS.counts()["observer"] == before + 2
