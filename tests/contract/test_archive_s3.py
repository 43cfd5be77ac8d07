"""The archive in S3, as moto's server has it: ``make test-contract`` says where that is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pyarrow import fs

from moescope.archive.store import Store
from moescope.errors import CommandError
from moescope.servers import free_ports
from moescope_service.archive.process import locked
from tests.unit.test_archive_files import Bench, make_trace
from tests.waiting import DEADLINE_S, wait_until

MOTO = os.environ.get("MOESCOPE_S3_SERVER")


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A server with an empty bucket, which the environment names as AWS' tools want it."""
    if MOTO is None:
        pytest.skip("MOESCOPE_S3_SERVER names no moto_server: make test-contract installs one")
    (port,) = free_ports(1)
    env = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [MOTO, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: answers(env["AWS_ENDPOINT_URL"]), "moto's server answers")
        fs.S3FileSystem(
            scheme="http", endpoint_override=f"127.0.0.1:{port}", allow_bucket_creation=True
        ).create_dir("bucket")
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def test_traces_are_published_found_deleted_and_expired(s3):
    bench = Bench("s3://bucket/some/prefix", archive_ttl_s=100.0)
    bench.publish(*map(make_trace, "abc"))
    assert bench.names() == ["a", "b", "c"]
    assert bench.delete("b") == 1
    bench.begin()
    assert bench.acknowledged() == 3
    assert bench.names() == ["a", "c"]
    assert bench.routes("a", start=2)[1][0].num_rows == 3
    assert bench.routes("b")[0].status == "unknown"
    bench.pass_s(100)
    assert bench.paths() == []


def test_a_store_that_is_not_reached_loses_nothing(s3):
    bench = Bench("s3://bucket/prefix")
    s3.kill()
    s3.wait(DEADLINE_S)
    bench.publish(make_trace("a"))
    (figures,) = [one for one in bench.figures() if one.is_failing]
    assert figures.files == 0
    assert bench.acknowledged() == 0
    assert bench.routes("a")[0].status == "finished"


def test_an_object_store_is_not_held_by_a_process():
    with locked(Store("s3://bucket/prefix")), locked(Store("s3://bucket/prefix"), 0):
        pass


@pytest.mark.parametrize("location", ["gs://bucket", "s3://", "s3:///", "s3://bucket//prefix"])
def test_other_places_are_refused(location):
    with pytest.raises(CommandError, match="invalid archive"):
        Store(location)
