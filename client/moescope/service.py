"""The way to the service package, which the client never imports by name."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
from types import ModuleType

from moescope.errors import CommandError

DEMO_MODEL = "moescope-demo"
"""The name under which the bundled model is served."""

INSTALL = (
    "in a clone of moescope, pip install '.[cuda]' on a machine with an NVIDIA GPU, make setup on "
    "one without"
)
"""What to do where the service, or something that it needs, is not installed."""


def require(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        CommandError: One is not; the message says what to install.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{package} is not installed: {INSTALL}")


def find(name: str, *, needs: tuple[str, ...] = ()) -> ModuleType:
    """Import a module of the service.

    Args:
        name: The module's name within ``moescope_service``.
        needs: Packages that must be installed for it to work.

    Raises:
        CommandError: The service or one of the packages is missing, or fails to import.
    """
    require("moescope_service", *needs)
    try:
        return importlib.import_module(f"moescope_service.{name}")
    except ImportError as error:
        raise CommandError(f"cannot import moescope_service.{name}: {error}; {INSTALL}") from error


def bundled_model() -> str:
    """Return the path of the bundled model.

    Raises:
        CommandError: The service is not installed.
    """
    return str(find("bundled_model").path())


def page() -> dict[str, str]:
    """Return the text of the files of the service's page, by their names.

    Raises:
        CommandError: The service is not installed.
    """
    require("moescope_service")
    folder = importlib.resources.files("moescope_service").joinpath("page")
    return {one.name: one.read_text("utf-8") for one in folder.iterdir() if one.is_file()}
