"""The loss in C++ for CPUs: the sources, how they are compiled (`build`) and how they are loaded (`library`)."""
