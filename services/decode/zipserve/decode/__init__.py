"""The decode service: pulls prefilled KV and continues sequences in one continuous batch."""
