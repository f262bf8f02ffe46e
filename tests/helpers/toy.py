"""Options of a warm start that takes a second and teaches nothing."""

from recipe.gtpo.tasks.arithmetic.warm_start import BaseOptions, WarmStartOptions

TOY_BASE = BaseOptions(
    hidden_size=16, layers=1, intermediate_size=16, skill=0.0, check_every=3, drill_steps=1, batch_size=2
)
TOY = WarmStartOptions(seed=3, steps=2, batch_size=2, base=TOY_BASE)
