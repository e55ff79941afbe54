"""What runs where the data is: local training and class gradients."""
