"""Puts the page's modules into one script: a browser loads no module from ``file://``.

Each module becomes a function that is called once and returns what it exports. The last one, which
nothing imports, stands as it is, so that it may ``await``. This is no bundler of JavaScript at
large: it knows the forms of import and export that the page has, and refuses all others.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Mapping

from moescope.errors import CommandError

_IMPORT = re.compile(r'^import \{([\w$,\s]+)\} from "\./([\w.]+)";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?=(?:class|const|function|async function)(?: ?\*)? ([\w$]+))", re.MULTILINE
)
_OTHER = re.compile(r"^\s*(?:import|export)\b.*|.*\bimport\s*[.(].*", re.MULTILINE)
_END_OF_SCRIPT = re.compile(r"</script|<!--", re.IGNORECASE)


def bundle(modules: Mapping[str, str], entry: str) -> str:
    """Return one module script that does what a module and all that it imports do.

    Args:
        modules: Source text, by file name.
        entry: The name of the module that starts everything.

    Raises:
        CommandError: A module imports or exports in a form that is not known here, imports what
            there is not, or one that imports it.
    """
    used: dict[str, list[str]] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name not in used:
            if name not in modules:
                raise CommandError(f"the page imports {name}, and has no such file")
            used[name] = [match[2] for match in _IMPORT.finditer(modules[name])]
            waiting += used[name]
    try:
        order = [*graphlib.TopologicalSorter(used).static_order()]
    except graphlib.CycleError as error:
        raise CommandError(f"modules of the page import each other: {error.args[1]}") from error
    exports = {name: _EXPORT.findall(modules[name]) for name in order}
    parts = [_wrapped(name, modules[name], exports) for name in order[:-1]]
    script = "\n".join([*parts, _body(entry, modules[entry], exports)])
    if _END_OF_SCRIPT.search(script):
        raise CommandError(
            "the page's scripts have </script or <!--, which would end an inline one"
        )
    return script


def _variable(name: str) -> str:
    return "$" + re.sub(r"\W", "_", name)


def _wrapped(name: str, source: str, exports: Mapping[str, list[str]]) -> str:
    body = f"{_body(name, source, exports)}\nreturn {{ {', '.join(exports[name])} }};"
    return f"const {_variable(name)} = (() => {{\n{body}\n}})();"


def _body(name: str, source: str, exports: Mapping[str, list[str]]) -> str:
    def imported(match: re.Match[str]) -> str:
        names = [one.split(" as ") for one in re.split(r"\s*,\s*", match[1].strip().rstrip(","))]
        for wanted, *_ in names:
            if wanted not in exports[match[2]]:
                raise CommandError(f"{name} imports {wanted}, which {match[2]} does not export")
        return f"const {{ {', '.join(map(': '.join, names))} }} = {_variable(match[2])};"

    body = _EXPORT.sub("", _IMPORT.sub(imported, source))
    other = _OTHER.search(body)
    if other:
        raise CommandError(f"{name} has a form that cannot be bundled: {other[0].strip()}")
    return body
