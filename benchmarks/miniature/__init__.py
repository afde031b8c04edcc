"""DroPE in miniature: does a model whose rotary embedding is dropped late find needles beyond its training length?

    python -m benchmarks.miniature --output DIR

- `data`      filler of known entropy, needles, questions
- `train`     the small model (stock classes), its trunk, branches without rotation
- `evaluate`  needles and filler by length and depth; the fitted temperature
- `arms`      what is compared, and the pieces of a run
- `worker`    one trunk and its arms in a process of its own
- `runner`    workers, and how a run is continued
- `verdict`   the rules, and what they say
- `results`, `table`, `figure`, `report`  what is shown and written
"""
