"""Passes: each a function from Program to Program, each in a file of its own.

Nothing here knows what an LSTM is.
"""
