"""Figures of reports. Each function takes numbers and returns a matplotlib figure; style.py has their look."""
