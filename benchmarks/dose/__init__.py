"""When is the gate worth using? Fine-tunes with a controlled share of rows that contradict what the base model is sure of.

    python -m benchmarks.dose run --minutes 8    # repeat it until nothing is missing; --parts main is the main study
    python -m benchmarks.dose report             # tables, figure, and the results that `eaftdrope inspect` quotes
    python -m benchmarks.dose select             # the facts, once; kept in facts.json

Every arm trains on the same rows, 60 % of which teach a new skill; the others are facts that the base model is sure of, and
a share of all rows contradicts them. What is forgotten is measured on other facts that the model was sure of, at equal
loss of the new skill. Design, decision rule and results are in LOG.md.

- `plan` what is trained, in order; `subjects`, `smollm2`, `llamas` the base models with their rows (`candidates`,
  `selection`, `texts`, `schemas`)
- `training`, `measures`, `run`, `results` one arm, its scores, the resumable program, its file
- `rule`, `table`, `figure` the decision rule and what is shown
"""
