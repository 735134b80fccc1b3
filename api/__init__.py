"""What a client sees: the OpenAI-compatible HTTP interface. It submits jobs and relays their streams."""
