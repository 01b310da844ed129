"""Other engines, asked to serve the same requests and measured the same way."""
