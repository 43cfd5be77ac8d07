"""Whose a request is: ids that others chose, users kept apart, and the admin."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers
from vllm.v1.engine import FinishReason

import moescope
from benchmarks.simulation.app import server_args
from moescope import errors
from moescope_service.api.auth import Keys
from moescope_service.errors import RefusedError
from moescope_service.settings import Settings

from .deployment import Deployment
from .fake_engine import OUTPUT

ALICE, BOB, ADMIN = "alice-key", "bob-key", "admin-key"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def complete(deployment, key, request_id, **headers):
    deployment.complete("", {**bearer(key), "X-Request-Id": request_id, **headers})


@pytest.fixture(scope="module", params=["off", "on"])
def admin(request):
    keys = {"api_key": [ALICE, BOB], "admin_key": ADMIN}
    with Deployment(private=request.param, **keys).running() as deployment:
        deployment.is_private = request.param == "on"
        yield deployment


@pytest.fixture(scope="module")
def private():
    with Deployment(api_key=[ALICE, BOB], private="on").running() as deployment:
        yield deployment


@pytest.fixture
def of(private):
    with (
        moescope.Client(private.url, api_key=ALICE) as alice,
        moescope.Client(private.url, api_key=BOB) as bob,
    ):
        yield alice, bob


class TestAResponsesOwnId:
    """A stranger chose it for an X-Request-Id."""

    def test_finds_it_alone(self, deployment, client):
        deployment.complete("victim")
        deployment.complete("", {"X-Request-Id": "cmpl-victim"})
        assert [trace.request_id for trace in client.routes("cmpl-victim")] == ["cmpl-victim"]
        (trace,) = client.routes("cmpl-cmpl-victim")
        assert trace.request_id == "cmpl-cmpl-victim"

    def test_deletes_it_alone_and_then_what_else_the_id_finds(self, deployment, client):
        deployment.complete("spared")
        deployment.complete("", {"X-Request-Id": "cmpl-spared"})
        assert client.delete("cmpl-spared") == 1
        assert [t.request_id for t in client.routes("cmpl-spared")] == ["cmpl-cmpl-spared"]
        assert client.delete("cmpl-spared") == 1
        with pytest.raises(errors.RequestNotFoundError):
            client.routes("cmpl-spared")

    def test_does_not_wait_for_the_stranger(self, deployment, client):
        deployment.complete("quick")
        (name,) = deployment.frontend.add("cmpl-quick-slow")
        sequence = deployment.engine.start(name)
        deployment.app.state.moescope_registration.add_id([name], "cmpl-quick")
        assert [trace.request_id for trace in client.routes("cmpl-quick")] == ["cmpl-quick"]
        deployment.frontend.put(name, OUTPUT, FinishReason.STOP)
        deployment.engine.step(finished=[sequence])

    def test_while_it_runs_is_not_the_strangers(self, deployment, client):
        (name,) = deployment.frontend.add("cmpl-slow")
        sequence = deployment.engine.start(name)
        deployment.complete("", {"X-Request-Id": "cmpl-slow"})
        assert deployment.http.get("/routes/cmpl-slow?wait_s=0").status_code == 202
        deployment.frontend.put(name, OUTPUT, FinishReason.STOP)
        deployment.engine.step(finished=[sequence])
        assert [t.request_id for t in client.routes("cmpl-slow", wait_s=10)] == ["cmpl-slow"]


class TestPrivate:
    def test_others_requests_do_not_exist(self, private, of):
        alice, bob = of
        complete(private, ALICE, "hers")
        assert alice.routes("hers")[0].request_id == "cmpl-hers"
        never = private.http.get("/routes/never", headers=bearer(BOB)).json()
        for request_id in ("hers", "cmpl-hers"):
            answer = private.http.get(f"/routes/{request_id}", headers=bearer(BOB))
            assert answer.status_code == 404
            told = answer.text.replace(request_id, "never")
            assert told == private.http.get("/routes/never", headers=bearer(BOB)).text
            with pytest.raises(errors.RequestNotFoundError):
                bob.delete(request_id)
        assert never["error"]["code"] == 404
        assert bob.routes_batch(["hers", "cmpl-hers"]).failed == {
            "hers": "unknown",
            "cmpl-hers": "unknown",
        }
        assert alice.routes("hers")[0].complete

    def test_lists_show_ones_own(self, private, of):
        alice, bob = of
        complete(private, ALICE, "list-a")
        complete(private, BOB, "list-b")
        ids = [{one.request_id for one in client.recent().sequences} for client in (alice, bob)]
        assert "cmpl-list-a" in ids[0]
        assert "cmpl-list-b" in ids[1]
        assert not ids[0] & ids[1]

    def test_one_id_of_two_users_is_two(self, private, of):
        for key in (ALICE, BOB):
            complete(private, key, "both")
        for client in of:
            assert len(client.routes("both")) == 1
        assert of[1].delete("both") == 1
        assert len(of[0].routes("both")) == 1

    def test_running_requests_too(self, private, of):
        alice, bob = of
        complete(private, BOB, "runs")
        (name,) = private.frontend.add("runs-on")  # of no key: nobody's
        sequence = private.engine.start(name)
        private.app.state.moescope_registration.add_id([name], "runs")
        assert len(bob.routes("runs")) == 1
        for client in (alice, bob):
            with pytest.raises(errors.RequestNotFoundError):
                client.routes("runs-on")
        private.frontend.put(name, OUTPUT, FinishReason.STOP)
        private.engine.step(finished=[sequence])

    def test_evicted_ones_too(self):
        with Deployment(api_key=[ALICE, BOB], private="on", memory="9k").running() as small:
            for number in range(6):
                complete(small, ALICE, f"e{number}")
                small.http.get(f"/routes/cmpl-e{number}", headers=bearer(ALICE))
            status = {
                key: small.http.get("/routes/cmpl-e0", headers=bearer(key)).status_code
                for key in (ALICE, BOB)
            }
            assert status == {ALICE: 410, BOB: 404}

    def test_without_an_admin_everyone_pauses(self, private):
        for path in ("pause", "resume", "reset"):
            assert private.http.post(f"/routes/{path}", headers=bearer(BOB)).status_code == 200


class TestTheAdmin:
    @pytest.mark.parametrize("path", ["pause", "resume", "reset"])
    def test_alone_pauses_and_resets(self, admin, path):
        answer = admin.http.post(f"/routes/{path}", headers=bearer(ALICE))
        assert answer.status_code == 403
        assert "--routes-admin-key" in answer.json()["error"]["message"]
        assert admin.http.post(f"/routes/{path}", headers=bearer("wrong")).status_code == 401
        assert admin.http.post(f"/routes/{path}", headers=bearer(ADMIN)).status_code == 200
        admin.http.post("/routes/resume", headers=bearer(ADMIN))

    def test_alone_deletes_what_others_made(self, admin):
        complete(admin, ALICE, "kept")
        answer = admin.http.delete("/routes/kept", headers=bearer(BOB))
        assert answer.status_code == (404 if admin.is_private else 403)
        assert ("--routes-admin-key" in answer.text) is not admin.is_private
        assert admin.http.get("/routes/kept", headers=bearer(ALICE)).status_code == 200
        assert admin.http.delete("/routes/kept", headers=bearer(ADMIN)).json()["deleted"] == 1
        complete(admin, ALICE, "own")
        assert admin.http.delete("/routes/own", headers=bearer(ALICE)).json()["deleted"] == 1

    def test_reads_everything(self, admin):
        complete(admin, ALICE, "seen")
        with moescope.Client(admin.url, api_key=ADMIN) as client:
            assert client.routes("seen")[0].complete
            assert "cmpl-seen" in {one.request_id for one in client.recent().sequences}
        seen = admin.http.get("/routes/seen", headers=bearer(BOB)).status_code
        assert seen == (404 if admin.is_private else 200)

    def test_is_told_to_nobody(self, admin):
        for path in ("/moescope/info", "/routes", "/openapi.json", "/metrics"):
            answer = admin.http.get(path, headers=bearer(ADMIN))
            assert answer.status_code == 200
            for key in (ADMIN, ALICE, BOB):
                assert key not in answer.text

    def test_of_a_server_without_keys(self):
        with Deployment(admin_key=ADMIN, private="off").running() as deployment:
            deployment.complete("any")
            assert deployment.http.get("/routes/cmpl-any").status_code == 200
            assert deployment.http.post("/routes/pause").status_code == 403
            assert deployment.http.delete("/routes/cmpl-any").status_code == 403
            answer = deployment.http.delete("/routes/cmpl-any", headers=bearer(ADMIN))
            assert answer.json()["deleted"] == 1


def owner(key, salt=b"salt", **flags):
    keys = Keys(server_args([ALICE, BOB]), Settings(**flags), salt)
    return keys.owner(Headers(bearer(key)))


def test_an_owner_is_the_same_in_every_server_of_a_deployment_and_no_key():
    assert owner(ALICE) == owner(ALICE, is_private=True)
    assert len({owner(ALICE), owner(BOB), owner(ALICE, salt=b"another deployment's")}) == 3
    assert len(owner(ALICE)) == 32
    assert ALICE.encode().hex() not in owner(ALICE)
    assert owner("nobody's") is None


def test_users_without_keys_cannot_be_kept_apart():
    with pytest.raises(RefusedError, match=r"--routes-private on: .* --api-key"):
        Keys(server_args(), Settings(is_private=True), b"salt")
