"""What lies in checkpoints: reading, checking, converting and writing them."""
