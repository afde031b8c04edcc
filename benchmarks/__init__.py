"""Benchmarks of eaftdrope beside its peers, with committed results. Not part of the installed package.

    python -m benchmarks.loss        the loss beside every peer: time, memory, gradient error
    python -m benchmarks.training    training steps beside TRL's SFTTrainer
    python -m benchmarks.miniature   DroPE in miniature: trained from scratch, dropped, compared
    python -m benchmarks.tail        the tail-sparse backward: its errors, and training with it
    python -m benchmarks.dose        when the gate is worth using, by the share of rows that contradict the model

Arms take turns in one process order, ratios and medians are reported, and every result file names its hardware, versions
and date. LOG.md is the dated log of what was tried, negative results included; results/ has the committed files.
"""
