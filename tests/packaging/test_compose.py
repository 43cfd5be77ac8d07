"""docker/compose.yaml, Prometheus' and Grafana's files: each names what another one has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from containers import COMPOSE, DOCKER, ROOT, SECRET_NAME, SERVICES, final, mounts

PROMETHEUS = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
BOARDS = ROOT / "dashboards" / "generated"
PROVISIONING = DOCKER / "grafana" / "provisioning"
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def dockerfile(service: dict[str, Any]) -> Path:
    return DOCKER / service["build"]["context"] / service["build"]["dockerfile"]


def on_host(service: str, path: str) -> Path:
    """Return where a path of a container lies in the repository."""
    for target, source in mounts(SERVICES[service]).items():
        if PurePosixPath(path).is_relative_to(target):
            return DOCKER / source / PurePosixPath(path).relative_to(target)
    raise AssertionError(f"{service} mounts nothing at {path}")


def test_every_path_exists() -> None:
    for name, service in SERVICES.items():
        for target, source in mounts(service).items():
            if source.startswith("."):
                assert (DOCKER / source).exists(), f"{name} mounts {source} at {target}"
                assert f"{source}:{target}:ro" in service["volumes"]
            else:
                assert source in COMPOSE["volumes"]
    for service in OURS.values():
        assert dockerfile(service).is_file()


def test_either_service_runs_with_the_same_settings() -> None:
    cpu, gpu = OURS["cpu"], OURS["gpu"]
    own = {"build", "image", "profiles", "deploy"}
    assert {k: v for k, v in cpu.items() if k not in own} == {
        k: v for k, v in gpu.items() if k not in own
    }
    assert (cpu["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])
    assert "COMPOSE_PROFILES=cpu" in (DOCKER / ".env").read_text().splitlines()


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_read_only_and_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    if name in OURS:
        (volumes,) = final(dockerfile(service), "VOLUME")
        assert set(volumes.array()) == mounts(service).keys()
        assert final(dockerfile(service), "HEALTHCHECK")
    else:
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert service["user"].split(":")[0] not in {"0", "root"}
        assert service["healthcheck"]["test"][0] == "CMD"


def test_secrets_come_from_outside() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name):
                assert value is None or value.startswith("/run/secrets/"), name
        for secret in service.get("secrets", []):
            directory = (DOCKER / COMPOSE["secrets"][secret]["file"]).relative_to(ROOT).parent
            assert f"/{directory}/" in (ROOT / ".gitignore").read_text().splitlines()
    assert not SECRET_NAME.search(re.sub("#.*", "", (DOCKER / ".env").read_text()))


def test_prometheus_scrapes_the_service() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    ((target,),) = (config["targets"] for config in job["static_configs"])
    host, port = target.split(":")
    for service in OURS.values():
        assert service["networks"]["default"]["aliases"] == [host]
        (exposed,) = final(dockerfile(service), "EXPOSE")
        assert port == exposed.value
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_grafana_has_the_data_source_and_the_dashboards() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "moescope.yaml").read_text())[
        "providers"
    ]
    assert on_host("grafana", provider["options"]["path"]).resolve() == BOARDS
    for kind in ("datasources", "dashboards"):
        path = f"/etc/grafana/provisioning/{kind}"
        assert on_host("grafana", path).resolve() == PROVISIONING / kind


def uids(node: Any) -> set[str]:
    """Return every data source uid that a dashboard names, variables included."""
    if isinstance(node, list):
        return set().union(*map(uids, node))
    if not isinstance(node, dict):
        return set()
    source = node.get("datasource")
    own = {source["uid"]} if isinstance(source, dict) and "uid" in source else set()
    return own.union(*map(uids, node.values()))


def test_the_dashboards_find_that_data_source() -> None:
    path = PROVISIONING / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    assert source["isDefault"] is True
    boards = sorted(BOARDS.glob("*.json"))
    assert boards
    for board in boards:
        dashboard = json.loads(board.read_text())
        allowed = {source["uid"], "-- Grafana --"}
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "datasource":
                assert variable["query"] == source["type"]
                current = (variable.get("current") or {}).get("value", "default")
                assert current in {"default", source["uid"]}, board.name
                allowed |= {f"${{{variable['name']}}}", f"${variable['name']}"}
        assert uids(dashboard) <= allowed, board.name


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed: it comes with Debian's prometheus")
    (option,) = [o for o in SERVICES["prometheus"]["command"] if o.startswith("--config.file=")]
    path = PurePosixPath(option.partition("=")[2])
    assert on_host("prometheus", str(path)) == DOCKER / "prometheus.yml"
    rules = [on_host("prometheus", str(path.parent / rule)) for rule in PROMETHEUS["rule_files"]]
    here = tmp_path / "prometheus.yml"
    here.write_text(yaml.safe_dump({**PROMETHEUS, "rule_files": [str(rule) for rule in rules]}))
    check = subprocess.run(
        ["promtool", "check", "config", str(here)], check=False, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr
    for rule in rules:
        assert list(rule.parent.glob(rule.name)), f"no file for {rule}"


def test_what_can_be_set_and_kept_is_documented() -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    interpolated = re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text())
    passed_on = [name for service in OURS.values() for name in service["environment"]]
    paths = [path for service in OURS.values() for path in mounts(service)]
    for name in (*interpolated, *passed_on, *paths, *COMPOSE["volumes"]):
        assert f"`{name}" in page, name
