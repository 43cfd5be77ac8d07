"""The members of an ``.npz`` file on disk, large ones some rows at a time; nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from moescope.received import MAX_BYTES, parse_json

_npy: Any = np.lib.format  # numpy gives its functions no types


class NpzFile:
    """An ``.npz`` on disk; a context manager.

    Args:
        path: The file.

    Raises:
        zipfile.BadZipFile: It is none.
    """

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self._names = set(self._archive.namelist())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._archive.close()

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._names

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return an array as a whole.

        Raises:
            KeyError: There is none of that name.
        """
        with self._archive.open(f"{name}.npy") as file:
            array: npt.NDArray[Any] = _npy.read_array(file, allow_pickle=False)
        return array

    def json(self, name: str) -> Any:  # noqa: ANN401
        """Return what the bytes of an array say as JSON.

        Raises:
            FormatError: They are no JSON, or too much.
            KeyError: There is none of that name.
        """
        return parse_json(self.array(name).tobytes(), 4 * MAX_BYTES)

    def rows(self, name: str) -> ArrayRows:
        """Return an array whose rows are read one after the other; a context manager.

        Raises:
            KeyError: There is none of that name.
            ValueError: It is not ``[num_rows, num_layers, top_k]`` of numbers.
        """
        return ArrayRows(self._archive.open(f"{name}.npy"))


class ArrayRows:
    """An array whose rows are read one after the other; a context manager.

    Args:
        file: An ``.npy``.

    Attributes:
        shape: ``[num_rows, num_layers, top_k]``.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        version = _npy.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"an array has version {version} of .npy: expected (1, 0)")
        self.shape, is_fortran, self._dtype = _npy.read_array_header_1_0(file)
        if is_fortran or self._dtype.kind not in "uif" or len(self.shape) != 3:
            raise ValueError(f"an array is {self._dtype} of shape {self.shape}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def take(self, num_rows: int) -> npt.NDArray[Any]:
        """Return the next rows.

        Raises:
            ValueError: There are not as many.
        """
        size = num_rows * math.prod(self.shape[1:]) * self._dtype.itemsize
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError(f"an array of shape {self.shape} ends early")
        return np.frombuffer(data, self._dtype).reshape(num_rows, *self.shape[1:])
