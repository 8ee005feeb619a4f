"""Tuning: the settings of a method that are best on the validation split.

`tune` is the command. `candidates` says which settings are tried, `groups` which of
them share a program, `crowd` trains these, `halving` lets the better half train on, and
`results` writes the table, the picture and the config.
"""
