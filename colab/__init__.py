"""Notebooks: each a .py file in percent format, from which `python -m colab.build` makes the .ipynb beside it."""
