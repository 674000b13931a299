"""Show me: the figures of the paper, and the command line."""
