"""What the API and the workers must agree on: settings, keys, the stream protocol and its Redis scripts."""
