"""Training of an image classifier, the example that shows the layers."""
