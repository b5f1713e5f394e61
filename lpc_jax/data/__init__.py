"""Text in, NumPy out: pairs, tokens, packed rows. Never touches a device."""

import logging

# transformers says so when it is imported; here only its tokenizers are used, and
# those need no torch. Before the rooms below import it, hence at import time.
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)
