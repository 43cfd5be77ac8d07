"""What the processes of one deployment share: a private directory, and the collector bound in it.

The first process makes the directory and starts the collector (`deployment`, `supervisor`); the
others find it by an environment variable (`directory`). It holds the collector's socket, what API
keys are hashed with (`salt`) and, where a worker refuses to capture, the reason (`refusal`).
"""

from __future__ import annotations

from moescope_service.runtime.deployment import Deployment, ensure_collector, release
from moescope_service.runtime.directory import archive_address, collector_address
from moescope_service.runtime.refusal import reported_reason, reported_refusal
from moescope_service.runtime.salt import owner_salt
from moescope_service.runtime.supervisor import Supervisor

__all__ = [
    "Deployment",
    "Supervisor",
    "archive_address",
    "collector_address",
    "ensure_collector",
    "owner_salt",
    "release",
    "reported_reason",
    "reported_refusal",
]
