import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "matplotlib", "typer", "moescope_service", "huggingface_hub", "pyarrow")


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import moescope", HEAVY),
        ("import moescope.cli", tuple(name for name in HEAVY if name != "typer")),
    ],
)
def test_importing_stays_light(statement, heavy):
    code = f"{statement}\nimport sys\nprint(*({set(heavy)!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


def test_every_exported_name_is_there():
    import moescope

    assert [name for name in moescope.__all__ if not hasattr(moescope, name)] == []
    assert moescope.__all__ == sorted(moescope.__all__)
