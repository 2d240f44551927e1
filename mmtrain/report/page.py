"""One HTML file with data, style and script inside: nothing of it is fetched, and its policy forbids it to."""

from __future__ import annotations

import html
from importlib import resources
from typing import Any

from mmtrain.report.encode import script_json

SCRIPTS = (
    *("data", "format", "state", "axis", "pen", "chart", "pointer", "heat"),
    *("dom", "sections", "summary", "maps", "evals", "details", "sweep", "main"),
)
"""Parts of the page's script, in the order in which they are joined."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(data: dict[str, Any], title: str) -> str:
    """Return the HTML of a page.

    Args:
        data: ``runs`` and ``sweeps``, as `payload` and `sweep` make them. Texts in it reach the page as text alone: the
            script writes none as HTML.
        title: of the window.
    """
    folder = resources.files("mmtrain.report") / "page"
    style = (folder / "style.css").read_text(encoding="utf-8")
    parts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<div id="page"><noscript><p class="notice">This page draws its charts with a script of its own, which is switched off
here.</p></noscript></div>
<script type="application/json" id="data">{script_json(data)}</script>
<script>
"use strict";
(() => {{
{parts}
}})();
</script>
</body>
</html>
"""
