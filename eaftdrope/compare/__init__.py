"""One recipe under several gates: equal data, order and budget, measured apart from training, and judged by a fixed rule.

Reading order:

    plan.py           the arms: gate x learning rate x seed, each a recipe
    training.py       trains the arms that are not finished
    measurement.py    measures the base model and every arm with the recipe's probes
    stored_scores.py  their scores on disk
    match.py          interpolates the arms to an equal target gain and measures them there (on request)
    verdict.py        the rule that decides which differences are beyond the spread
    results.py        compare.json: all of this in one document
    table.py          the document as a table, Markdown and CSV
    estimate.py       steps, disk and time, before anything is trained
    run.py            all of the above in order

Every step stores its result in the comparison's folder at once, so the same command resumes an interrupted comparison:

    compare.json            the whole document, as the report reads it
    compare.md, compare.csv the table
    arms/LABEL-seedS        a finished run per arm, as `eaftdrope train` leaves it
    scores/NAME.json        scores of `base` and of each arm, written probe by probe
"""
