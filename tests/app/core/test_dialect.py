"""What an engine's dialect promises."""

import pytest

from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from app.core.tiers import Tier


def test_an_engine_preempts_only_if_its_adapter_says_so():
    replica = ReplicaStatus("r", "pool", "http://x", "key", 1, "1", None, Dialect("vllm"))
    assert not replica.preempts


def test_a_replica_reports_that_its_engine_preempts():
    dialect = Dialect("vllm", False, dict.fromkeys(Tier, 0), frozenset(Route), preempts=True)
    assert ReplicaStatus("r", "pool", "http://x", "key", 1, "1", None, dialect).preempts


def test_an_engine_without_native_priority_cannot_preempt_by_it():
    with pytest.raises(AssertionError):
        Dialect("vllm", preempts=True)
