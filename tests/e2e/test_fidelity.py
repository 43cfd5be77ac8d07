"""Routes of the eager server are the model's."""

from __future__ import annotations

from moescope import Client
from moescope.servers import Server

from .fidelity import check_fidelity


def test_routes_equal_those_of_hf_transformers(eager_server: Server, eager: Client) -> None:
    check_fidelity(eager_server, eager)
