"""The router: the public face. Tokenizes, admits, picks workers, streams, and replays what a dying worker left."""
