"""Callbacks of a training.

On the screen: `progress`. Into files of the run folder: `metrics`, `landscape`, `probes`, `recovery` (the first three
through `step_lines`). Stopping a training whose numbers are not finite: `divergence`, and `plain_trainer` for the plain
`transformers.Trainer`, with the metrics of the gate.
"""
