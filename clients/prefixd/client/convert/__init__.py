"""Files of other tools, read on the client's side and turned into PEFT's two files.

``read_source`` takes a path or the id of a repository on the Hugging Face Hub. What is PEFT's
safetensors already, or a text, passes unchanged and needs no other package; the other formats need
numpy (``pip install 'prefixd[convert]'``).
"""
