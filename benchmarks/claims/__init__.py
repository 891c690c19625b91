"""What the papers claim: NAME.md says it, NAME.py measures it."""
