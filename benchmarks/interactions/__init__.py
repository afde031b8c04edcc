"""The interaction lab: questions about combinations of EAFT, DroPE, TTT-E2E and RLM that nobody has published.

    python -m benchmarks.interactions u2 run --minutes 8    # repeat until nothing is missing
    python -m benchmarks.interactions u2 report             # the table, results/u2.json and results/u2.png

- `lab`               what a lab is: pieces, comparisons, and their rule
- `run`, `results`    a resumable run; paired differences and the file of results
- `table`, `drawing`  output
- `toy_training`      models on the toy of benchmarks/ttt, trained once and kept
- `u1` to `u8`        one lab per file; `u5_text` is U5 on natural text, `u8c` part (c) of U8

LOG.md has the rules, written before the results.
"""
