"""Checkpoints: PEFT adapters on their base models, merged checkpoints, and models between base and trained one.

In reading order: `adapters` (folders with an adapter, and loading them), `interpolate` (the line between two models),
`mergeable` (what can be merged, from the configuration only), `merge` (one ordinary checkpoint, checked after saving).
"""
