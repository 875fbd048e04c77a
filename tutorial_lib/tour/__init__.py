"""`make tour`: from real text to a trained Transformer and a report, in about two minutes of training."""
