import pytest

from app import alarms


@pytest.fixture(autouse=True)
def fresh_alarms(monkeypatch):
    """One that another test has just raised would not be logged again."""
    monkeypatch.setattr(alarms, "PROCESS", alarms.Alarms())
