"""Section 3.1: two scores of equal error, one conservative and one not."""
