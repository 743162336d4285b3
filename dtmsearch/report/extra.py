"""The libraries of the extra `report`, or the command that installs them."""

from __future__ import annotations

from dtmsearch.errors import UserError

try:
    import altair
    import jinja2
    import vl_convert
except ImportError as error:
    raise UserError(
        f"a report needs {error.name}, which is not installed here: pip install 'dtmsearch[report]'"
    ) from error

__all__ = ["altair", "jinja2", "vl_convert"]
