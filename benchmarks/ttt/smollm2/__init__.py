"""TTT on SmolLM2-135M and natural text, beside every control.

    python -m benchmarks.ttt smollm2 run --text TRAIN.jsonl --test-text TEST.jsonl --minutes 9.5   # repeat until finished
    python -m benchmarks.ttt smollm2 report

- `texts`     training rows, passages on which rates are fitted, test passages
- `plan`      settings, and the tasks of the program in order
- `models`    a model for a task: its weights, its window, how it learns as it reads
- `rules`     inner steps other than clipped SGD
- `training`  meta-training and the fine-tuned control, on the same rows in the same order; resumed exactly
- `measure`   loss by position, and the pass-key test
- `run`       runs what is missing, for a limited time
- `document`  the results file
- `summary`   paired differences, tables
- `figure`    the figure
- `command`   the command line
"""
