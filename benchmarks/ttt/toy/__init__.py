"""The toy: does test-time training remember beyond the window, where that is needed and the best possible loss is known?

    python -m benchmarks.ttt toy --output DIR

- `task`     sequences with a successor table each, and the best predictions that are possible
- `arms`     the arms: models from stock classes, and their training
- `run`      the pieces of a run, one per arm and seed, resumed
- `report`, `figure`   output
"""
