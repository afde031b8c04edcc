"""The probes of a recipe, one file each, named as in the recipe.

    build.py             names and options -> probes; running them on a model
    base.py              the interface of a probe, and the held-out data it may use
    held_out_loss.py     cross-entropy of held-out rows
    perplexity.py        perplexity of general text
    multiple_choice.py   questions answered by likelihood
    function_calls.py    held-out function calls, by generation
    answers.py           numeric_answers, exact_answers and yes_no_maybe, by generation
    instructions.py      instructions that can be verified, by generation
    agreement.py         KL divergence from the base model
    rlm_tasks.py         long contexts, with the model as the root of a recursive language model

To add a probe: its file here with a line in build.py, and its options in recipe/probe_sections.py.
"""
