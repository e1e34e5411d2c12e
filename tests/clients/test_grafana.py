"""The dashboard is what Grafana's own types ask for (npm's ``@grafana/schema``)."""

import copy
import json
import subprocess
from functools import partial

import pytest

from scripts.monitoring.dashboard import dashboard
from tests.clients.conftest import LIMIT_S, PROGRAMS, interpreter

pytestmark = pytest.mark.unit


@pytest.fixture
def problems(tmp_path):
    """Return the function that has a dashboard checked, and returns what does not fit."""
    _, environment = interpreter("clients-node")
    modules = environment / "node_modules"
    return partial(_problems, tmp_path, modules)


def _problems(folder, modules, made):
    schema = modules / "@grafana" / "schema" / "dist" / "types"
    options = {
        "strict": True, "noEmit": True, "skipLibCheck": True, "types": [], "target": "es2022",
        "module": "esnext", "moduleResolution": "bundler",
        "paths": {"grafana/*": [f"{schema}/*"], "@grafana/schema": [f"{schema}/index.d.ts"]},
    }  # fmt: skip
    config = {"compilerOptions": options, "files": ["dashboard.ts"]}
    (folder / "tsconfig.json").write_text(json.dumps(config))
    source = (PROGRAMS / "dashboard.ts").read_text()
    text = source.replace("DASHBOARD", json.dumps(made, indent=1))
    (folder / "dashboard.ts").write_text(text)
    ended = subprocess.run(
        ["node", modules / "typescript" / "bin" / "tsc", "-p", folder, "--pretty", "false"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.stderr == ""
    return ended.stdout


def test_the_dashboard_fits_grafanas_types(problems):
    """993932d lacked `showLegend` and `calcs` of every legend, and `collapsed` of every row."""
    assert problems(dashboard()) == ""


def _broken(change):
    made = copy.deepcopy(dashboard())
    change(made, next(panel for panel in made["panels"] if panel["type"] == "timeseries"))
    return made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made, panel: made.update(titel="x"), "titel"),
        (lambda made, panel: panel["options"]["legend"].update(placement="left"), '"left"'),
        (lambda made, panel: made["templating"]["list"][1].update(refresh=7), "VariableRefresh"),
    ],
)
def test_what_does_not_fit_is_found(problems, change, said):
    assert said in problems(_broken(change))
