"""Models side by side: `eaftdrope eval`.

    catalogue.py   the suites and their parts, and the files given for them
    subject.py     a model or an adapter to measure, with its fingerprint
    plan.py        models and the steps of each, checked before a model is loaded
    run.py         measuring the plan, with cached scores
"""
