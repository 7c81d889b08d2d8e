"""Who may call the router: API keys."""
