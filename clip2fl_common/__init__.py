"""What clients and server share: configuration, models, data, teacher, messages."""
