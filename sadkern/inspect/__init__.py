"""What is in a file of trajectories and what of it would be trained on, before anything is."""

from sadkern.inspect.survey import Survey, survey

__all__ = ["Survey", "survey"]
