"""Checkpoints: PEFT adapters on their base models, merged checkpoints, and models between base and trained one.

In reading order: `adapters` (folders with an adapter, and loading them), `interpolate` (the line between two models),
`spectrum`, `repair_options` and `repair` (what can be undone of a training afterwards), `mergeable` (what can be merged,
from the configuration only), `output` (checks of a new folder), `merge` (one ordinary checkpoint, checked after saving),
`tensor_files` and `streamed` (whole models, repaired tensor by tensor).
"""
