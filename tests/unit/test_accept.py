"""``Accept-Encoding``."""

from __future__ import annotations

import pytest

from moescope_service.api.accept import takes_gzip


@pytest.mark.parametrize(
    "header",
    ["gzip", "GZIP", "x-gzip", "gzip, deflate, br", "br;q=1.0, gzip;q=0.8, *;q=0.1", "*",
     "gzip;q=0.001", "gzip ; q=1", "identity;q=0.5, gzip", "identity;q=0, *", "*;q=0, gzip",
     "deflate,,gzip"],
)  # fmt: skip
def test_gzip_is_taken(header):
    assert takes_gzip(header)


@pytest.mark.parametrize(
    "header",
    ["", "identity", "br", "gzip;q=0", "gzip;q=0.000", "gzip;Q=0", "*;q=0", "gzip;q=0, *",
     "identity, gzip;q=0.5", "identity;q=1, *;q=0.5", "gzip;q=", "gzip;q=x", "gzip;q=nan",
     "gzip;q=-1", "gzipped", "x;gzip"],
)  # fmt: skip
def test_gzip_is_not_taken(header):
    assert not takes_gzip(header)
