"""What the processes of one deployment share: a private directory, and the collector bound in it.

The first process makes the directory and starts the collector (`deployment`, `supervisor`); the
others find it by an environment variable (`directory`). It holds the collector's socket, what API
keys are hashed with (`salt`) and, where a worker refuses to capture, the reason (`refusal`). Other
nodes of the engine have none: they reach the collector over tcp (`joining`).
"""

from __future__ import annotations

from moescope_service.runtime.deployment import Deployment, ensure_collector, release
from moescope_service.runtime.directory import archive_address, collector_address
from moescope_service.runtime.joining import join, join_if_elsewhere, link_address, owner_salt
from moescope_service.runtime.refusal import reported_reason, reported_refusal
from moescope_service.runtime.supervisor import Supervisor

__all__ = [
    "Deployment",
    "Supervisor",
    "archive_address",
    "collector_address",
    "ensure_collector",
    "join",
    "join_if_elsewhere",
    "link_address",
    "owner_salt",
    "release",
    "reported_reason",
    "reported_refusal",
]
