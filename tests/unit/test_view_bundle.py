"""The page's modules as one script."""

from __future__ import annotations

import re

import pytest

from moescope import service
from moescope.errors import CommandError
from moescope.view.bundle import bundle

PAGE = service.page()


def test_every_module_of_the_page_is_in_it_once_before_those_that_use_it():
    script = bundle(PAGE, "app.js")
    modules = [name for name in PAGE if name.endswith(".js") and name != "app.js"]
    places = {
        name: script.index(f"const ${name.replace('.', '_')} = (() => {{") for name in modules
    }
    for name in modules:
        assert script.count(f"const ${name.replace('.', '_')} = ") == 1
        for other in re.findall(r'from "\./([\w.]+)"', PAGE[name]):
            assert places[other] < places[name], f"{other} comes after {name}"
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert script == bundle(dict(reversed(PAGE.items())), "app.js")


def test_names_are_a_modules_own():
    script = bundle(
        {
            "app.js": 'import { one as first, two } from "./a.js";\n'
            'import {\n  three,\n} from "./b.js";\nuse(first, two, three);\n',
            "a.js": "const own = 1;\nexport const one = own;\nexport function* two() {}\n",
            "b.js": "const own = 2;\nexport async function three() {}\nexport class Four {}\n",
        },
        "app.js",
    )
    assert "const { one: first, two } = $a_js;" in script
    assert "const { three } = $b_js;" in script
    assert "return { one, two };" in script
    assert "return { three, Four };" in script
    assert script.endswith("use(first, two, three);\n")


@pytest.mark.parametrize(
    "line",
    [
        'import one from "./a.js";', 'import "./a.js";', 'import * as a from "./a.js";',
        'import { one } from "https://a/b.js";', "import { one } from './a.js'",
        "export default class {}", "export let one = 1;", "export { one };",
        'export * from "./a.js";', 'const one = await import("./a.js");', "use(import.meta.url);",
    ],
)  # fmt: skip
def test_a_form_that_is_not_known_is_refused(line):
    with pytest.raises(CommandError, match=r"^app\.js has a form that cannot be bundled: "):
        bundle({"app.js": f"use();\n{line}\n", "a.js": "export const one = 1;\n"}, "app.js")


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"app.js": 'import { a } from "./b.js";'}, "imports b.js, and has no such file"),
        (
            {"app.js": 'import { a } from "./b.js";', "b.js": "const a = 1;"},
            "app.js imports a, which b.js does not export",
        ),
        (
            {
                "app.js": 'import { a } from "./a.js";',
                "a.js": 'import { b } from "./b.js";\nexport const a = 1;',
                "b.js": 'import { a } from "./a.js";\nexport const b = 1;',
            },
            "import each other",
        ),
        ({"app.js": 'use("</SCRIPT>");'}, "would end an inline one"),
        ({"app.js": 'use("<!--");'}, "would end an inline one"),
    ],
)
def test_modules_that_do_not_fit_are_refused(modules, words):
    with pytest.raises(CommandError, match=words):
        bundle(modules, "app.js")
