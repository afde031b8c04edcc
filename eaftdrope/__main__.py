"""`python -m eaftdrope`, for launchers such as torchrun and accelerate."""

from eaftdrope.cli import main

if __name__ == "__main__":
    main()
