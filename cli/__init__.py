"""What a person types: `endmark dev | api | worker`."""
