"""Benchmarks: ours and the peers, in one process order, with committed results.

    eaftdrope bench loss             the loss beside every peer: time, memory, gradient error
    eaftdrope bench training         training steps beside TRL's SFTTrainer
    python -m eaftdrope.bench.tail   the tail-sparse backward: its errors, and training with it

What was measured, and what was tried and not kept, is told in results/README.md.
"""
