"""``/moescope``: the page to look at. Its files hold no data, so they need no key.

What the page shows it fetches from the other endpoints, with the key that its user types in.
"""

from __future__ import annotations

import importlib.resources

from fastapi import APIRouter, HTTPException, Response

from moescope_service.parsers import shown

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = {
    file.name: file.read_bytes()
    for file in importlib.resources.files("moescope_service").joinpath("page").iterdir()
    if file.name.rpartition(".")[2] in _MEDIA_TYPES
}
"""By name; no other name is looked for."""

router = APIRouter(tags=["moescope"])


@router.get("/moescope", summary="The page", response_class=Response)
@router.head("/moescope", include_in_schema=False)
async def page() -> Response:
    """Return the page: live experts, and a request's tokens by expert."""
    return _response("index.html")


@router.get("/moescope/page/{name}", include_in_schema=False)
@router.head("/moescope/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """Return one of the page's scripts or its style sheet."""
    return _response(name)


def _response(name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404, f"the page has no file {shown(name)}")
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(_FILES[name], media_type=f"{media_type}; charset=utf-8", headers=HEADERS)
