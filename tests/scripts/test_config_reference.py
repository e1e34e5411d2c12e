import pytest

from scripts.config_reference import TARGET, render

pytestmark = pytest.mark.unit


def test_the_configuration_reference_is_what_the_types_say():
    assert TARGET.read_text() == render(), "run `python scripts/config_reference.py`"
