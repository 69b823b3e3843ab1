"""Training data: documents of token ids, the target's hidden states at their tokens, and batches of both."""
