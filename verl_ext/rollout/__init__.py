"""A rollout for verl without vLLM or SGLang: Hugging Face's forward, batched and cached, behind verl's server mode.

- `generation`: sampling with continuous batching; no verl, no Ray.
- `server`: the Ray actor, verl's handle on it, and what brings it new weights.
"""
