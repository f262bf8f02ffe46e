"""Tools for verl's multi-turn rollouts (`multi_turn.tool_config_path`)."""
