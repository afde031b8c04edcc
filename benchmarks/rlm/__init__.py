"""Recursive language models (`eaftdrope.rlm`): costs of the engine, and other engines beside it, with committed results.

    python -m benchmarks.rlm engine --out benchmarks/rlm/results/engine.json
    python -m benchmarks.rlm bench
    python -m benchmarks.rlm peers --rlms PYTHON --dspy PYTHON --out benchmarks/rlm/results/peers.json

- `bench`     SmolLM2 before and after its training as a root, from results of `eaftdrope rlm bench`: table and figure
- `engine`    CPU seconds by length of the context, per sandbox, of a replay, and of batched calls beside single ones
- `roots`     small roots trained with three losses (a package of its own: python -m benchmarks.rlm.roots)
- `peers`     `rlms` and `dspy.RLM` on the same scripted tasks: limits, a kill, the host's files
"""
