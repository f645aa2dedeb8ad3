"""A scripted small world whose transcripts feed the demonstration."""
