"""Environments on the supercomputer: an interpreter, packages and the user's code, made once and never changed."""
