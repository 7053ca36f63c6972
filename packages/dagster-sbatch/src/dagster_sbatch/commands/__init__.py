"""The commands: each module has the body of one script."""
