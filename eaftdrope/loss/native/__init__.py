"""The loss in C++ for CPUs: the sources, their compilation (`build`) and loading (`library`)."""
