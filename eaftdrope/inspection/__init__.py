"""What a model makes of training data before it is trained: which tokens contradict it, in which rows, and how much of the
gradient they would be.

    rows -> tokens.py (one forward, tiles of logits) -> tally.py (sums), worst.py (conflicts, rows) -> document.py

Memory does not grow with the rows, but for 40 bytes of figures a row: rows are read, looked at and let go in windows.
"""
