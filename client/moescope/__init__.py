"""moescope: the routing of mixture-of-experts models, served by vLLM, fetched by request id.

>>> import moescope
>>> client = moescope.Client("http://localhost:8000")
>>> (trace,) = client.routes("chatcmpl-…")
>>> trace.topk_ids.shape  # [num_rows, num_layers, top_k]
"""

from moescope._async_client import AsyncClient
from moescope._client import Client
from moescope._version import __version__
from moescope.batch import RoutesBatch
from moescope.errors import (
    AuthenticationError,
    CollectorDownError,
    CommandError,
    ConnectionFailedError,
    DatasetError,
    FormatError,
    InvalidQueryError,
    LayerNotCapturedError,
    MoescopeError,
    PermissionDeniedError,
    RequestNotFoundError,
    ResponseTooLargeError,
    ServerError,
    StillRunningError,
    TraceEvictedError,
)
from moescope.records import ExpertCounts, LogInfo, RecentPage, SequenceInfo, ServerInfo, StoreInfo
from moescope.trace import RouteTrace, Source

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "CollectorDownError",
    "CommandError",
    "ConnectionFailedError",
    "DatasetError",
    "ExpertCounts",
    "FormatError",
    "InvalidQueryError",
    "LayerNotCapturedError",
    "LogInfo",
    "MoescopeError",
    "PermissionDeniedError",
    "RecentPage",
    "RequestNotFoundError",
    "ResponseTooLargeError",
    "RouteTrace",
    "RoutesBatch",
    "SequenceInfo",
    "ServerError",
    "ServerInfo",
    "Source",
    "StillRunningError",
    "StoreInfo",
    "TraceEvictedError",
    "__version__",
]
