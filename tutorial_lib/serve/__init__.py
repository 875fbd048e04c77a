"""A model at work: answering requests, holding a conversation."""
