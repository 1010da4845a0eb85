"""A host for `train_lora.py` and the tools, in the browser and over HTTP."""
