"""`python -m recipe.gtpo.experiments.twin [hydra overrides]`: the package's docstring says what it is."""

from __future__ import annotations

import sys

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from recipe.gtpo.experiments.twin.settings import Settings, refuse_unread  # noqa: E402
from recipe.gtpo.experiments.twin.training import train  # noqa: E402
from recipe.gtpo.run.checks import ConfigError, check, prepare, register  # noqa: E402
from recipe.gtpo.run.errors import call_hydra  # noqa: E402
from recipe.gtpo.run.identity import claim  # noqa: E402
from recipe.gtpo.run.record import RecordError, RunRecord  # noqa: E402


@hydra.main(config_path="../../config", config_name="gtpo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    try:
        refuse_unread(hydra_config.overrides.task)
        check(config, dict(hydra_config.runtime.choices))
        settings = Settings.of(config, prepare(config))
        claim(RunRecord(settings.run_dir), config)
    except (ConfigError, RecordError) as e:
        print(f"twin: error: {e}", file=sys.stderr)
        sys.exit(1)
    train(settings)


if __name__ == "__main__":
    register()
    call_hydra(main, "twin")
