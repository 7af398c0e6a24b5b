"""rollout.mode=server: what can be said of its servers before the run."""

from __future__ import annotations

import pytest

ROLLOUT = "actor_rollout_ref.rollout"
SERVER = (f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.mode=server")
NEAR, FAR, SAFE = "http://127.0.0.1:30000", "http://10.0.0.5:30000", "https://gpu7.example.org"


@pytest.fixture
def problems(checked, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "a-secret")

    def found(*overrides: str) -> dict[str, str]:
        _, findings = checked(*SERVER, *overrides)
        text = " ".join(f"{p.key} {p.value} {p.why} {p.fix}" for p in findings.problems) + str(findings.warnings)
        assert "secret" not in text
        return {problem.key.removeprefix(f"{ROLLOUT}."): problem.why for problem in findings.problems}

    return found


@pytest.mark.parametrize(
    "urls", [NEAR, "http://localhost:30000", "'http://[::1]:30000'", f"[{NEAR},http://127.0.0.1:30001]"]
)
def test_servers_on_this_machine_need_no_key(problems, urls):
    assert problems(f"{ROLLOUT}.server_urls={urls}") == {}


def test_other_machines_need_one(problems, checked):
    assert "it has no key" in problems(f"{ROLLOUT}.server_urls={FAR}")["server_urls"]
    assert "it has no key" in problems(f"{ROLLOUT}.server_urls={SAFE}")["server_urls"]
    key = f"{ROLLOUT}.server_api_key_env=SERVER_KEY"
    assert problems(f"{ROLLOUT}.server_urls=[{FAR},{SAFE}]", key) == {}
    (warning,) = checked(*SERVER, f"{ROLLOUT}.server_urls=[{FAR},{SAFE}]", key)[1].warnings
    assert f"the key goes to {FAR} unencrypted" in warning


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("[]", "needs server addresses"),
        ("10.0.0.5:30000", "not the URL of a server"),
        ("ftp://10.0.0.5", "not the URL of a server"),
        ("'http://127.0.0.1:port'", "not a URL"),
        ("http://user:secret@127.0.0.1:30000", "a password has no place in it"),
        ("'http://127.0.0.1:30000/?key=secret'", "no query"),
        (f"[{NEAR},{NEAR}/]", "named twice"),
        ("['http://user:secret@127.0.0.1:1','http://user:secret@127.0.0.1:1']", "a password has no place in it"),
    ],
)
def test_urls_that_are_none_are_named(problems, urls, says):
    assert says in problems(f"{ROLLOUT}.server_urls={urls}")["server_urls"]


def test_a_key_comes_by_the_name_of_its_variable(problems, monkeypatch):
    urls = f"{ROLLOUT}.server_urls={FAR}"
    assert "not set" in problems(urls, f"{ROLLOUT}.server_api_key_env=NO_SUCH_VARIABLE")["server_api_key_env"]
    found = problems(urls, f"{ROLLOUT}.server_api_key_env=a-secret-itself")
    assert "not the name of an environment variable" in found["server_api_key_env"]


def test_servers_are_sglangs(problems):
    for engine in ("hf", "vllm"):
        assert (
            "supports SGLang servers only"
            in problems(f"{ROLLOUT}.name={engine}", f"{ROLLOUT}.server_urls={NEAR}")["name"]
        )


def test_weights_by_disk_need_a_folder_that_can_be_written(problems, tmp_path):
    disk = (f"{ROLLOUT}.server_urls={NEAR}", f"{ROLLOUT}.server_weight_update=disk")
    assert "needs a folder" in problems(*disk)["server_weights_dir"]
    assert "another folder" in problems(*disk, f"{ROLLOUT}.server_weights_dir=weights")["server_weights_dir"]
    (tmp_path / "file").write_text("")
    found = problems(*disk, f"{ROLLOUT}.server_weights_dir={tmp_path / 'file' / 'x'}")
    assert "not a folder that can be written" in found["server_weights_dir"]
    assert problems(*disk, f"{ROLLOUT}.server_weights_dir={tmp_path / 'new' / 'x'}") == {}


def test_engines_of_servers_need_no_package_here_and_no_devices(problems):
    assert problems(f"{ROLLOUT}.server_urls={NEAR}") == {}


def test_the_plan_says_where_the_engine_is(checked):
    from verl.checks.dry_run import _setup
    from verl.config.loading.load import load

    plan, _ = checked(*SERVER, f"{ROLLOUT}.server_urls={NEAR}", f"{ROLLOUT}.tensor_model_parallel_size=3")
    config = load([*SERVER, f"{ROLLOUT}.server_urls={NEAR}", "actor_rollout_ref.model.path=m"]).config
    assert ("rollout engine", "sglang, on 1 server elsewhere; weights by tensors") in _setup(config, plan)
