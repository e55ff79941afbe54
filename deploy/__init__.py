"""Scripts and settings of a deployment; docs/deployment.md tells how to use them."""
