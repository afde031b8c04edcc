"""Claims about the four methods that paper and pencil or a tiny model can check, in seconds.

    python -m benchmarks.claims                 # all, into results/claims.json
    python -m benchmarks.claims E16 D5          # some, printed only

- `check`               what a check returns
- `gate_claims`         EAFT's gate on constructed tokens
- `position_claims`     attention and gradients with and without rotary embedding, untrained
- `arithmetic`          figures of papers and articles against each other

docs/evidence.md has every claim with its status.
"""
