"""Tasks: the data, prompt and score of each. Arithmetic also makes the policy that a machine without a GPU trains."""
