"""Archives of traces: Parquet by hour, as ``moescope serve --routes-archive`` writes them.

Needs the extra ``arrow``. DuckDB and polars scan the files directly; `Archive` reads traces.
"""

try:
    import pyarrow as pa  # noqa: F401
except ImportError as error:
    raise ImportError(
        "archives need pyarrow, moescope's extra `arrow`: pip install pyarrow"
    ) from error

from moescope.archive.reading import Archive
from moescope.archive.table import SCHEMA_VERSION, Archived

__all__ = ["SCHEMA_VERSION", "Archive", "Archived"]
