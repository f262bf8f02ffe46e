"""The page as one file: data, script and style inside, nothing loaded from anywhere, opened from disk.

Data is JSON, gzipped, in base64: whatever a model wrote, the file around it is the same. The policy in the page names
the hash of each of its two scripts and of its style; any other is refused by the browser.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_ext.viewer import queries
from verl_ext.viewer.app import STATIC
from verl_ext.viewer.runs import Run

#: More trajectories than this make a page that a browser is slow with.
MOST = 5000

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>Where the credit went</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<script>{method}</script>
<script>{script}</script>
</body>
</html>
"""


def write(runs: Sequence[Run], out: Path, steps: set[int] | None) -> str:
    """Write the page and say in one line what is in it; on stderr, what a what-if of it will lack.

    Args:
        steps: those whose trajectories the page has; None: all. Curves and the gradient are those of the whole run.

    Raises ValueError when no trajectory is left, too many for one page, or an option that its formulas do not know.
    """
    for run in runs:
        if run.whatif is not None and (unknown := run.whatif.uncontrolled(run.config)):
            named = ", ".join(f"{name}={value}" for name, value in unknown.items())
            raise ValueError(
                f"{run.path}: an exported page does not know the option {named}; look at it with the server"
            )
    contents = [_run(run, steps) for run in runs]
    trajectories = sum(len(content["conversations"]) for content in contents)
    if not trajectories:
        raise ValueError(
            f"no recorded trajectory in {', '.join(str(run.path) for run in runs)}, or none of those steps"
        )
    data: dict[str, Any] = {"overview": queries.overview(runs), "runs": contents}
    for said, content in zip(data["overview"]["runs"], contents, strict=True):
        said["steps"] = _steps(content["groups"])
        said["trajectories"] = len(content["conversations"])
    packed = base64.b64encode(gzip.compress(json.dumps(data, allow_nan=False).encode(), mtime=0)).decode()
    whatif = runs[0].whatif
    method = whatif.JAVASCRIPT.read_text() if whatif else ""
    script, style = (STATIC / "app.js").read_text(), (STATIC / "style.css").read_text()
    policy = (
        f"default-src 'none'; script-src {_hash(method)} {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_PAGE.format(policy=policy, style=style, data=packed, method=method, script=script))
    cut = sum(content["cut"] for content in contents)
    shortened = f", {cut} texts cut to {queries.TEXT_LIMIT} characters" if cut else ""
    return f"{out}: {trajectories} trajectories of {len(runs)} run(s), {out.stat().st_size / 1e6:.1f} MB{shortened}"


def _run(run: Run, steps: set[int] | None) -> dict[str, Any]:
    groups = [one for one in queries.all_groups(run) if steps is None or one["step"] in steps]
    count = sum(one["size"] for one in groups)
    if count > MOST:
        raise ValueError(
            f"{run.path} has {count} trajectories, more than {MOST}: choose some with --steps, e.g. --steps 1,20"
        )
    rows, missing, why = {}, 0, ""
    for split, step in sorted({(one["split"], one["step"]) for one in groups}):
        found = queries.step_rows(run, split, step)
        if run.whatif is not None and split == "train":  # an exported page cannot compare programs
            similar, lost, reason = run.whatif.similarities(found, run.config, lambda at=(split, step): run.codes(*at))
            missing, why = missing + lost, why or reason
            found = [row | {"similar": one} for row, one in zip(found, similar, strict=True)]
        rows[f"{split}/{step}"] = found
    if missing:
        said = f"viewer: {run.path}: {missing} pairs of programs are not compared, and a what-if that needs one says so"
        print(f"{said}: {' '.join(why.split())}", file=sys.stderr)
    conversations = {row["id"]: queries.conversation(run, row["id"]) for found in rows.values() for row in found}
    return {
        "groups": groups,
        "rows": rows,
        "conversations": conversations,
        "gradient": queries.gradient(run),
        "metrics": run.metrics(),
        "cut": sum(_cut_texts(one) for one in conversations.values()),
    }


def _cut_texts(node: Any) -> int:
    if isinstance(node, dict):
        return 1 if node.keys() == {"text", "length"} else sum(map(_cut_texts, node.values()))
    return sum(map(_cut_texts, node)) if isinstance(node, list) else 0


def _steps(groups: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    splits = sorted({one["split"] for one in groups})
    return {split: sorted({one["step"] for one in groups if one["split"] == split}) for split in splits}


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
