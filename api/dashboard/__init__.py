"""The dashboard: pages that show a running deployment, and act on it."""
