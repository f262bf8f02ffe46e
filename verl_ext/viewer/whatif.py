"""Who answers "what would the advantages be with other options?": the method that trained, registered by its package.

    [project.entry-points."verl_ext.viewer"]
    gtpo = "recipe.gtpo.whatif"

The module has `controls()`, `presets()`, `settings_of(config)`, `uncontrolled(config)`,
`recompute(rows, settings, config, codes)`, `similarities(rows, config, codes)`, and in `JAVASCRIPT` the path of the
same formulas for an exported page; the docstrings of `recipe/gtpo/whatif/` say what goes in and out. Without one the
page has no what-if, and says so.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

GROUP = "verl_ext.viewer"


def load() -> Any | None:
    """The registered module, None where there is none. Raises ValueError where there are several."""
    found = {point.value: point for point in metadata.entry_points(group=GROUP)}
    if len(found) > 1:
        raise ValueError(f"several packages answer {GROUP!r}: {', '.join(sorted(found))}; uninstall all but one")
    return next(iter(found.values())).load() if found else None
