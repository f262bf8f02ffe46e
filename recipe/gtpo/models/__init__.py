"""Policies that a run makes for itself, by `model=NAME`; any other is named by `actor_rollout_ref.model.path`."""
