"""Which of our own workers, how many and how arranged, serve most within limits."""
