"""How fast the engine is: decode steps, prefill, start-up, streams beside long prompts; beside rivals and limits."""
