import ast
from pathlib import Path

import pytest

from app import alarms, supervision
from app.gateway.body_memory import NoRoom
from app.observe.catalogue import ALARMS, FAILURES, RESTARTS
from app.observe.process import process_samples

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


def found(registry, raised):
    return {(s.metric, s.labels): s.value for s in process_samples(registry, raised)}


async def test_work_is_there_with_0_before_it_fails():
    registry, raised = supervision.Registry(), alarms.Alarms()

    async def work():
        return

    await supervision.run_once("some work", work, registry)
    values = found(registry, raised)
    assert values[FAILURES, ("some work",)] == values[RESTARTS, ("some work",)] == 0
    registry.failed("some work", ValueError())
    registry.failed("other", ValueError(), restarts=False)
    values = found(registry, raised)
    assert values[FAILURES, ("some work",)] == values[RESTARTS, ("some work",)] == 1
    assert (values[FAILURES, ("other",)], values[RESTARTS, ("other",)]) == (1, 0)


def test_an_alarm_is_there_with_0_before_it_is_raised():
    raised = alarms.Alarms()
    assert {v for (m, _), v in found(supervision.Registry(), raised).items() if m is ALARMS} == {0}
    raised.raised("odd usage", "")
    assert found(supervision.Registry(), raised)[ALARMS, ("odd usage",)] == 1


COMPOSED = {
    "f'refused for {reason.value}'": {f"refused for {reason.value}" for reason in NoRoom},
    "f'{self._name} full'": {"access log full", "traces full"},
    "f'{self._name} lost'": {"access log lost", "traces lost"},
}


def raised_in_sources():
    """Return every name that an alarm is raised with."""
    names = set()
    for folder in ("app", "deployments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "raised":
                    name = node.args[0]
                    if isinstance(name, ast.Constant):
                        names.add(name.value)
                    else:
                        names |= COMPOSED[ast.unparse(name)]
    return names


def test_every_alarm_is_known_in_advance():
    """Otherwise its first time is no increase for Prometheus, and no alert fires."""
    assert raised_in_sources() == set(alarms.NAMES)
