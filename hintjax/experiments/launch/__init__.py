"""The start and the end of a process among several.

The processes meet (`meeting`), each joins the others (`process`), and before training
all of them end together (`ending`).
"""
