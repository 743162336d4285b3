"""What mkdocs asks while it builds the site: links to the code, which is no page of it."""

from __future__ import annotations

import re
from typing import Any

_TO_CODE = re.compile(r"\[(?P<text>[^\]]*)\]\(\.\./(?P<path>[^)#]+\.py)#L(?P<line>\d+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Links to lines of the code lead to the repository, where the site names one, else they say the line."""

    def to_repository(link: re.Match[str]) -> str:
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/HEAD/{link['path']}#L{link['line']})"
        return f"{link['text']}, line {link['line']}"

    return _TO_CODE.sub(to_repository, markdown)
