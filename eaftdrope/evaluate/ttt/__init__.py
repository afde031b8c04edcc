"""What test-time training adds on a text, beside every control: `eaftdrope ttt eval`.

    plan = make_plan(TTTEvalOptions("runs/mine", texts=(Path("novel.txt"),), control="runs/window_only"))
    results = TTTEvalResults(Path("runs/ttt/mine"), plan)
    run_plan(plan, results)                       # each passage of each arm is stored as soon as it is measured
    of_document(results.document).losses["ttt"].minus(of_document(results.document).losses["full"])

Reading order:

    options.py       the options
    ttt_folder.py    the models
    arms.py          full attention, windows, naive TTT, the fine-tuned control, TTT on and off
    passages.py      passages for the test, and others for the fit of an inner rate
    rate.py          that fit
    positions.py     loss by position, and paired differences
    needle.py        five digits inside and outside the window
    latency.py       time and memory by context position
    retention.py     what reading costs the model
    plan.py          all of it checked, cell by cell
    run.py           measuring the plan
    results.py       its folder
    table.py         its tables
"""
