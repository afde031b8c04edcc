"""From a checked recipe to its result: plan, build, train, probe, finish.

Read in this order:

    train.py        run_recipe: every stage prepared first, then run one after the other
    stages/         stage.py (the interface), chain.py (a recipe's stages), and one file per kind: drope, recalibrate, eaft;
                    training.py is what the kinds that train share
    settings.py     the settings of one training, resolved from the recipe's sections
    data.py         rows or blocks of text, encoded
    build.py        model, probes, and the checks before weights are loaded; arguments.py: the trainer
    plan.py         what a training will do, in numbers (memory.py, limits.py)
    probing.py      probes and sample answers before, during and after training; recovery.py: those of a recalibration
    result.py       the saved result; finish.py: model card, merged model, report, upload
    folder.py       the run folder (record.py: run.json; checkpoints.py; fingerprint.py; resuming.py)
    machine.py      devices, processes, precision; interrupts.py: a full disk, Ctrl-C, the lock; lora.py: adapters
"""
