import re

import pytest

from app.observe.catalogue import METRICS, Kind

pytestmark = pytest.mark.unit


def test_names_and_labels_are_prometheus_own_and_rays():
    """Ray refuses a colon, and Serve adds three labels of its own."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"(frontline|gen_ai)_[a-z_]+", metric.name)
        assert all(re.fullmatch(r"[a-z_]+", label) for label in metric.labels)
        assert not {"application", "deployment", "replica"} & set(metric.labels) or (
            metric.name.startswith("frontline_scaling")
        )
        assert metric.text.endswith(".")


def test_no_label_names_a_tenant_a_key_or_a_request():
    for metric in METRICS:
        assert not {"tenant", "key", "key_id", "request_id", "user"} & set(metric.labels)


def test_a_histogram_is_seen_as_three_series():
    for metric in METRICS:
        assert len(metric.series) == (3 if metric.kind is Kind.HISTOGRAM else 1)
        assert all(name.startswith("ray_") for name in metric.series)
