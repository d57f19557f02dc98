"""The stages, in the order of pipeline.py; each module has one public `run`."""
