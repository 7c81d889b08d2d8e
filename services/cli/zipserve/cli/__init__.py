"""The command line: runs a whole stack on this machine, and talks to one anywhere. No torch, no transformers."""
