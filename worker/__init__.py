"""What produces tokens: claims jobs, runs the agent and publishes what it says."""
