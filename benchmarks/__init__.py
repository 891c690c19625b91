"""Measurements of the library; see the README beside this file."""
