"""Fewer bits and fewer weights: what is saved on paper, and on this machine."""
