"""Supervised fine-tuning: from conversations to what is learned from them."""
