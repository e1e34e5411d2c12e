"""What crosses between an ingress and the ``Limits`` deployment."""

from datetime import date
from decimal import Decimal

import pytest
from ray import cloudpickle

from app.tenants.budget import Budget, Owner, Period
from app.tenants.deployment import Limits, ServeLimits
from app.tenants.spending import SpendReport

pytestmark = pytest.mark.unit


class Remote:
    """A handle's method: what goes in and comes out is serialized, as by Ray."""

    def __init__(self, method):
        self._method = method

    async def remote(self, *values):
        answer = await self._method(*cloudpickle.loads(cloudpickle.dumps(values)))
        return cloudpickle.loads(cloudpickle.dumps(answer))


class Handle:
    def __init__(self, limits):
        self.answer, self.spend = Remote(limits.answer), Remote(limits.spend)


async def test_ingresses_learn_what_the_others_have_spent(monkeypatch):
    monkeypatch.setattr("app.tenants.deployment.keep_on_loopback", lambda: None)
    limits = ServeLimits(Handle(Limits()))
    spends = [
        Budget(Owner.KEY, "k1", period, Decimal(1)).at(date(2026, 11, 30)) for period in Period
    ]
    digits = Decimal("0.000000000000000000000000000000123456789")
    await limits.spend(SpendReport("one", dict.fromkeys(spends, digits)))
    known = await limits.spend(SpendReport("two", dict.fromkeys(spends, Decimal(0))))
    assert known == {spend: {"one": digits, "two": 0} for spend in spends}
    assert await limits.answer({}) == {}
