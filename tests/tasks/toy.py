"""Options of a warm start that takes a second and teaches nothing."""

from recipe.gtpo.tasks.warm_start import WarmStartOptions

TOY = WarmStartOptions(
    seed=3, hidden_size=16, layers=1, intermediate_size=16, steps=3, drill_steps=1, clean_steps=2, batch_size=2
)
