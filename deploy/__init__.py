"""Scripts and settings of a deployment; docs/deployment.md explains them."""
