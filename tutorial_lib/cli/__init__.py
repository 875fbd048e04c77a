"""The command line: `llm-scratch train`, `eval`, `generate`, `tokenize`; each also as `python -m tutorial_lib.cli.train`."""
