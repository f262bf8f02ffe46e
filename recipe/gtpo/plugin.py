"""What `import verl` loads in every process, through the entry point `verl.plugins` (pyproject.toml).

It makes our names known to verl's registries, so that `algorithm.adv_estimator=gtpo` works in any verl command, not
only in ours. verl logs a failing plugin at DEBUG only; `assert_registered` turns that into an error at start-up.
"""

from __future__ import annotations

import os

import verl_ext.plugin  # noqa: F401  before verl: it settles its platform at the first question any of its modules asks

# isort: split
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

from recipe.gtpo.estimator import ESTIMATORS

for _name, _function in ESTIMATORS.items():
    register_adv_est(_name)(_function)


def assert_registered() -> None:
    """Raise RuntimeError when verl did not load this module as a plugin (then its workers will not either)."""
    from importlib.metadata import entry_points

    if not any(ep.value == __name__ for ep in entry_points(group="verl.plugins")):
        raise RuntimeError(
            "verl does not know the gtpo plugin: the package is not installed, so Ray workers cannot find the 'gtpo' "
            "estimator. Run `pip install --no-deps -e .` in this repository."
        )
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()  # read as verl reads it
    if policy != "auto" and "gtpo" not in [name.strip() for name in policy.split(",")]:
        raise RuntimeError(f"VERL_USE_EXTERNAL_PLUGINS={policy!r} keeps verl from loading the gtpo plugin; unset it.")
    for name, function in ESTIMATORS.items():
        if ADV_ESTIMATOR_REGISTRY.get(name) is not function:
            raise RuntimeError(f"another package has registered an advantage estimator named {name!r} with verl")
