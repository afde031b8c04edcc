"""One recipe under several gates: the same data, order and budget, measured apart from training, and judged by a rule.

    plan -> train the arms -> measure the base and every arm -> match (on request) -> table, verdict

Every step leaves its result in the comparison's folder as soon as it has it, so that the same command goes on after a kill:

    compare.json            everything below in one document, as the report reads it
    compare.md, compare.csv the table
    arms/LABEL-seedS        a finished run each, as `eaftdrope train` leaves it
    scores/NAME.json        scores of `base` and of every arm, probe by probe
"""
