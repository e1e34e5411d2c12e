import pytest

from app.config.ingress import IngressSettings
from app.config.model import ModelArgs, ModelSettings
from app.core.paths import expand_path
from app.core.settings import SettingsError
from app.core.tiers import PriorityMode

pytestmark = pytest.mark.unit

POOL = {"name": "vllm", "engine": "vllm", "model": "m"}


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(SettingsError, match=r"user_config\.tiers\.prio: there is no such setting"):
        ModelSettings.load({"tiers": {"prio": "auto"}}, "user_config")


def test_every_problem_is_told_with_its_key_and_value():
    with pytest.raises(SettingsError) as caught:
        ModelArgs.load({"id": "a b", "pools": [{**POOL, "slots": 0}, {"name": "x"}]}, "args")
    text = str(caught.value)
    assert "args.id" in text and "'a b'" in text
    assert "args.pools.0.slots" in text and "got 0" in text
    assert "args.pools.1.engine: must be set" in text


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ([POOL, POOL], "two pools share the name 'vllm'"),
        ([{**POOL, "name": "Model"}], "may not be called 'Model'"),
        ([], "args.pools"),
    ],
)
def test_pool_names_must_make_distinct_deployments(pools, message):
    with pytest.raises(SettingsError, match=message):
        ModelArgs.load({"id": "m", "pools": pools}, "args")


def test_tiers_default_to_proved_priority():
    assert ModelSettings().tiers.offer.priority is PriorityMode.AUTO


def test_a_trusted_proxy_is_an_address_or_a_network():
    settings = IngressSettings.load({"trusted_proxies": ["10.0.0.0/8", "::1"]}, "user_config")
    assert list(map(str, settings.trusted_networks)) == ["10.0.0.0/8", "::1/128"]
    for bad in ("10.0.0.1/8", "proxy.example.com", ""):
        with pytest.raises(SettingsError, match=r"trusted_proxies\.0: .*no address and no network"):
            IngressSettings.load({"trusted_proxies": [bad]}, "user_config")


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        IngressSettings().auth = "keys"  # type: ignore[misc]


def test_yaml_reads_off_as_false_and_the_error_says_what_is_wanted():
    with pytest.raises(SettingsError, match=r"tiers\.priority.*'auto', 'off' or 'queue'"):
        ModelSettings.load({"tiers": {"priority": False}}, "user_config")


def test_paths_expand_home_and_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.delenv("FRONTLINE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert expand_path("~/m") == f"{tmp_path}/m"
    assert expand_path("${MODELS}/m") == "/models/m"
    assert expand_path("${FRONTLINE_HOME}/m") == f"{tmp_path}/.cache/frontline/m"
    assert expand_path("org/model") == "org/model"
    with pytest.raises(SettingsError, match="not set"):
        expand_path("${NO_SUCH_VARIABLE_HERE}/m")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://frontline:hunter2@db/frontline",
        "postgresql://frontline:${LEDGER_PASSWORD}@db/frontline",
        "sqlite:///${FRONTLINE_HOME}/ledger/usage.db",
    ],
)
def test_the_ledgers_url_is_never_shown(url):
    settings = IngressSettings.load({"ledger": url}, "user_config")
    assert settings.ledger.get_secret_value() == url
    assert url not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    "url",
    [
        "mysql://frontline:hunter2@db/frontline",
        "frontline:hunter2",
        ["postgresql://frontline:hunter2@db/frontline"],
        {"postgresql://frontline:hunter2@db/frontline": 1},
        "",
        None,
    ],
)
def test_a_wrong_url_is_told_by_its_key_and_not_shown(url):
    with pytest.raises(SettingsError, match=r"^user_config\.ledger: expected") as caught:
        IngressSettings.load({"ledger": url}, "user_config")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_open_is_for_loopback(host):
    IngressSettings().check_open(host)


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "10.0.0.5", "node.example"])
def test_open_to_a_network_is_said_twice(host):
    with pytest.raises(SettingsError, match="open_to_network"):
        IngressSettings().check_open(host)
    IngressSettings.load({"open_to_network": True}, "user_config").check_open(host)
    IngressSettings.load({"auth": "keys"}, "user_config").check_open(host)
