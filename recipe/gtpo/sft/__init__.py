"""The cold start: verl's SFT trainer on transcripts of tool calls (`python -m recipe.gtpo.sft`).

- `transcripts`: what there is to imitate, from any source, as chat messages. No verl.
- `sources`: where transcripts come from.
- `train`: the folder of a trained model, made in a process of its own.
- `worker`: that process.
"""
