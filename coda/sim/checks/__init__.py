"""What the machine does -> findings and counts."""
