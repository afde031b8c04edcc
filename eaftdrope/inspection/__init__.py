"""Training data through the eyes of a model before its training: the tokens that contradict it, the rows they are in, and
their share of the gradient.

    run.py         `eaftdrope inspect`: from a recipe to a filled folder
    survey.py      the pass over all rows, in windows of them
    tokens.py      a batch: statistics, gate and gradient norm of every trained token, in tiles of logits
    tally.py       sums over all tokens
    worst.py       the worst conflicts, and the ranking of rows
    text.py        tokens as text
    on_policy.py   the contrast: text that the model samples itself
    gate_benefit.py
                   what a study measured of the gate at such a share of conflicts
    results.py     inspect.json, conflicts.jsonl, rows.jsonl

Memory does not grow with the rows, except for 40 bytes of figures per row.
"""
