"""The OpenAPI document of the HTTP API. It tells of the software, and nothing of a deployment. No I/O."""
