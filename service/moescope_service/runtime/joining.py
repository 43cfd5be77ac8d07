"""Joins the deployment of the first node, from another one: before anything is loaded there."""

from __future__ import annotations

import logging
import os
import queue
import time

from moescope_service.addresses import Address, node_address
from moescope_service.errors import RefusedError
from moescope_service.link import Link
from moescope_service.messages import Frames, unpack
from moescope_service.node_key import read_key
from moescope_service.nodes import alike
from moescope_service.queries import NodeQuery, NodeReply, pack_query, unpack_reply
from moescope_service.runtime import directory, salt
from moescope_service.settings import RUNTIME_DIR, Settings, flag

logger = logging.getLogger("moescope")

JOIN_TIMEOUT_S = 120.0
"""How long to wait for the first node: nodes are started in any order."""
_QUIET_S = 5.0
"""How long to wait without a word in the log."""
BROKEN_TIMEOUT_S = 10.0
"""How long connections may end without an answer: the first node may be starting just now."""


def link_address() -> Address:
    """Return where this process reaches its collector: on its own node, or on the first one.

    Raises:
        RefusedError: On another node, without the key.
    """
    settings = Settings.from_env()
    path = os.environ.get(RUNTIME_DIR)
    # Ray hands on the variables of the first node, this one's path among them.
    if settings.bind is None or (path and directory.is_ours(path)):
        return Address(directory.collector_address())
    return _elsewhere(settings)


def join_if_elsewhere() -> None:
    """Join where the collector is on another node; as `join`."""
    if link_address().key is not None:
        join(Settings.from_env())


def join(settings: Settings, timeout_s: float = JOIN_TIMEOUT_S) -> None:
    """Wait until the first node's collector answers, and compare this node with that one.

    Args:
        settings: Of this node.
        timeout_s: How long to wait, in seconds; connections that end at once are waited for no
            longer than `BROKEN_TIMEOUT_S`.

    Raises:
        RefusedError: It does not answer, takes another key, or has another version or setting.
    """
    theirs = _ask(_elsewhere(settings), timeout_s)
    for name, ours in alike(settings).items():
        if theirs.get(name) != ours:
            raise RefusedError(
                f"the first node has {name} {theirs.get(name, 'of another version')}, this one has "
                f"{ours}: they have to be alike on every node"
            )


def owner_salt() -> bytes:
    """Return what this deployment's API servers hash API keys with, alike on all nodes.

    Raises:
        RefusedError: The key of the nodes cannot be read.
    """
    key_file = Settings.from_env().key_file
    return salt.owner_salt() if key_file is None else read_key(key_file).owner_salt


def _elsewhere(settings: Settings) -> Address:
    address = node_address(settings)
    if address is None:
        raise RefusedError(
            f"this process finds no collector on its node: give {flag('bind')} and "
            f"{flag('key_file')} on every node"
        )
    return address


def _ask(address: Address, timeout_s: float) -> dict[str, str]:
    heard: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
    link = Link(
        address,
        heard.put,
        name="moescope-join",
        introduce=lambda: [pack_query(0, NodeQuery())],
        on_away=lambda: heard.put(None),
    )
    try:
        return _answer(heard, address.url, timeout_s)
    finally:
        link.close(0)


def _answer(heard: queue.SimpleQueue[Frames | None], url: str, timeout_s: float) -> dict[str, str]:
    end_s, is_there = time.monotonic() + timeout_s, False
    quiet_s = min(_QUIET_S, timeout_s)
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            frames = heard.get(timeout=min(quiet_s or left_s, left_s))
        except queue.Empty:
            if quiet_s:
                logger.warning("the collector at %s has not answered yet: waiting for it", url)
            quiet_s = 0.0
            continue
        if frames is not None:
            reply = unpack_reply(NodeQuery.reply, unpack(frames)[1], frames)
            return reply.alike if isinstance(reply, NodeReply) else {}
        if not is_there:
            end_s, is_there = min(end_s, time.monotonic() + BROKEN_TIMEOUT_S), True
    if is_there:
        raise RefusedError(
            f"{url} ends every connection: this node's {flag('key_file')} is not a copy of the "
            f"first node's, or {flag('bind')} does not name that node's collector"
        )
    raise RefusedError(
        f"the collector at {url} did not answer within {timeout_s:g} s: start the first node, "
        f"with the same {flag('bind')}, and let this node reach that port"
    )
