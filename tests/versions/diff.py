"""``python -m tests.versions.diff 0.32.0 0.33.0``: what changed in what moescope relies on.

Downloads vLLM's two wheels and compares the files that hold the internals of the contract: what of
them changed, what is gone and where it is defined now, and which requirements changed. ``--all``
adds what else changed in these files, ``--patch`` the changes themselves.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from moescope_service.vllm_contract.internals import (
    FRONT_END,
    ROUTING_REPLAY,
    WEIGHTS,
    WORKER,
    Internal,
)

READ = {
    "vllm.v1.engine.output_processor": ["OutputProcessor.process_outputs"],
    "vllm.model_executor.layers.fused_moe.runner.moe_runner": ["(module)"],  # the layer's operators
    "vllm.entrypoints.launchers.cli_args": ["make_arg_parser"],
    "vllm.logger": ["configure_logging_from_args"],
    "vllm.plugins.endpoint_plugins.interface": ["attach_endpoint_plugins"],
}
"""What moescope neither calls nor replaces, but whose meaning it relies on, by module."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")


class Wheel:
    """The Python files of a vLLM.

    Args:
        path: The wheel.
    """

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self.names = [one for one in self._archive.namelist() if one.endswith(".py")]

    def source(self, module: str) -> str | None:
        """Return a module's source; None where there is no such module."""
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if name in self.names:
                return self._archive.read(name).decode()
        return None

    def requirements(self) -> set[str]:
        """Return what the wheel requires, without extras."""
        (metadata,) = (one for one in self._archive.namelist() if one.endswith("/METADATA"))
        lines = self._archive.read(metadata).decode().splitlines()
        found = {line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")}
        return {one for one in found if "extra ==" not in one}

    def where_defined(self, name: str) -> list[str]:
        """Return the files that define a function or class of this name."""
        heads = (f"def {name}(", f"class {name}(", f"class {name}:")
        return [one for one in self.names if _has_line(self._archive.read(one).decode(), heads)]


def _has_line(source: str, heads: tuple[str, ...]) -> bool:
    return any(line.startswith(heads) for line in source.splitlines())


def definitions(source: str) -> dict[str, str]:
    """Return the source of every function, class body and method, and of other statements, by name.

    Statements of a module that define nothing stand under ``(module)``, those of a class under
    ``Class.(class)``; comments and docstrings' layout do not count.
    """
    found: dict[str, list[str]] = {}
    for owner, node in _walk(ast.parse(source)):
        name = getattr(node, "name", None)
        key = f"{owner}{name}" if name else f"{owner}({'class' if owner else 'module'})"
        found.setdefault(key, []).append(ast.unparse(node))
    return {name: "\n".join(texts) for name, texts in found.items()}


def _walk(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                yield f"{node.name}.", inner
        else:
            yield "", node


def used(internals: Iterable[Internal]) -> dict[str, set[str]]:
    """Return what moescope relies on, by module: ``Class``, ``Class.name`` or ``name``."""
    found: dict[str, set[str]] = {module: set(names) for module, names in READ.items()}
    for internal in internals:
        prefix = f"{internal.class_name}." if internal.class_name else ""
        names = {prefix + name for name in internal.attributes}
        if internal.class_name:
            names |= {internal.class_name, f"{prefix}(class)", f"{prefix}__init__"}
        for module in internal.modules:
            found.setdefault(module, set()).update(names)
    return found


def report(old: Wheel, new: Wheel, *, shows_all: bool, with_patch: bool) -> Iterator[str]:
    """Yield the lines of a report: what changed from one wheel to the other."""
    before, after = old.requirements(), new.requirements()
    yield from (f"requires - {one}" for one in sorted(before - after))
    yield from (f"requires + {one}" for one in sorted(after - before))
    for module, names in sorted(used((*FRONT_END, *WORKER, *ROUTING_REPLAY, *WEIGHTS)).items()):
        source = old.source(module)
        if source is None:
            continue
        was, now = definitions(source), definitions(new.source(module) or "")
        changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if not changed:
            continue
        shown = changed if shows_all else [name for name in changed if name in names]
        yield f"\n{module}: {len(changed)} changed, {len(names & set(changed))} relied on"
        for name in shown:
            mark = "*" if name in names else " "
            yield f"{mark} {_change(name, was.get(name), now.get(name), new)}"
            if with_patch:
                yield from _patch(was.get(name, ""), now.get(name, ""))


def _change(name: str, was: str | None, now: str | None, new: Wheel) -> str:
    if now is not None:
        return f"{'new    ' if was is None else 'changed'} {name}"
    places = new.where_defined(name)
    return f"gone    {name}" + (f", now in {', '.join(places[:3])}" if places else "")


def _patch(was: str, now: str) -> Iterator[str]:
    lines = difflib.unified_diff(was.splitlines(), now.splitlines(), lineterm="")
    return (f"    {line}" for line in [*lines][2:])


def download(version: str, directory: Path) -> Wheel:
    """Download a vLLM's wheel for CUDA; its Python files are those of every build."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--dest", str(directory)]  # fmt: skip
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, f"vllm=={version}"], check=True)
    (path,) = directory.glob(f"vllm-{version}-*.whl")
    return Wheel(path)


def main() -> None:
    """Print what changed from one version to another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", help="such as 0.32.0")
    parser.add_argument("new", help="such as 0.33.0")
    parser.add_argument("--all", action="store_true", help="Also what moescope does not rely on.")
    parser.add_argument("--patch", action="store_true", help="Print the changes themselves.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moescope-vllm-") as name:
        wheels = map(functools.partial(download, directory=Path(name)), (args.old, args.new))
        for line in report(*wheels, shows_all=args.all, with_patch=args.patch):
            print(line)


if __name__ == "__main__":
    main()
