"""DroPE in miniature: does a model whose rotary embedding is dropped late find needles beyond its training length?

    python -m benchmarks.miniature --output DIR

- `data`      filler of known entropy, needles, queries
- `train`     the small model (stock classes), its trunk, branches without rotation
- `evaluate`  needles and filler by length and depth; the fitted temperature
- `arms`      the arms that are compared, and the pieces of a run
- `worker`    one trunk and its arms in their own process
- `runner`    starts the workers, and resumes a run
- `verdict`   the rules, and their outcomes
- `results`, `table`, `figure`, `report`   output
"""
