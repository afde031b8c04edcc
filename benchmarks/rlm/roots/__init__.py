"""Small roots trained with three losses: cross-entropy, EAFT, and EAFT whose gate is open on new names and the stop token.

    python -m benchmarks.rlm.roots run        # at most ten minutes; repeat it until nothing is missing
    python -m benchmarks.rlm.roots report     # the tables and the figure of what is measured so far

Every arm trains SmolLM2-135M as recipes/rlm/smollm2_root.yaml does, on fewer rows: the same ones. It is then the root of
50 trials of each task, over contexts 24 times as long as the trained ones. An interrupted training resumes from its
checkpoint, and trials are stored in groups.
"""
