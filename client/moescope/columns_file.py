"""A file of columns on disk, read some rows at a time: Parquet, an Arrow file or an Arrow stream.

Needs the extra ``arrow``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moescope.errors import CommandError, FormatError
from moescope.received import MAX_BYTES, parse_json

_ARROW_FILE = b"ARROW1"


class ColumnsFile:
    """A file of traces in columns; a context manager, as `columns_file` gives it.

    Attributes:
        shared: What the schema's metadata says; see `moescope.arrow`.
    """

    def __init__(self, names: list[str], metadata: Any) -> None:  # noqa: ANN401
        self.names = names
        self.shared = parse_json((metadata or {})[b"moescope"], 4 * MAX_BYTES)
        if self.shared.get("form") == "long":
            raise FormatError(
                "it is of the long form, one row a selection, which traces cannot be made of: give "
                "the file that it was made of"
            )

    def batches(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Yield record batches, every value checked.

        Args:
            num_rows: Of each, at most.
            columns: Their columns; all where None.
        """
        raise NotImplementedError


@contextlib.contextmanager
def columns_file(path: Path) -> Iterator[ColumnsFile]:
    """Open a file of columns, by its suffix.

    Raises:
        CommandError: pyarrow is not installed.
        FormatError: It is of the long form.
        Exception: It is no such file; what it is depends on where it is broken.
    """
    pa = require()
    if path.suffix == ".parquet":
        from pyarrow import parquet  # noqa: PLC0415

        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield _Parquet(file)
        return
    with pa.OSFile(str(path)) as source:
        is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        source.seek(0)
        yield _Arrow(pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source), is_file)


def require() -> Any:  # noqa: ANN401
    """Return pyarrow.

    Raises:
        CommandError: It is not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - the light base has no pyarrow
        import pyarrow.ipc  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            "Arrow and Parquet need pyarrow, moescope's extra `arrow`: pip install pyarrow"
        ) from error
    return pa


class _Parquet(ColumnsFile):
    def __init__(self, file: Any) -> None:  # noqa: ANN401
        schema = file.schema_arrow
        super().__init__(schema.names, schema.metadata)
        self._file = file

    def batches(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
        for batch in self._file.iter_batches(num_rows, columns=columns):
            batch.validate(full=True)
            yield batch


class _Arrow(ColumnsFile):
    def __init__(self, reader: Any, is_file: bool) -> None:  # noqa: ANN401
        super().__init__(reader.schema.names, reader.schema.metadata)
        self._reader, self._is_file = reader, is_file

    def batches(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
        reader = self._reader
        whole = map(reader.get_batch, range(reader.num_record_batches)) if self._is_file else reader
        for batch in whole:
            batch.validate(full=True)  # offsets of damaged bytes lead anywhere
            some = batch if columns is None else batch.select(list(columns))
            for start in range(0, len(some), num_rows):
                yield some.slice(start, num_rows)
