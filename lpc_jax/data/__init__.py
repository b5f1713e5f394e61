"""Text in, NumPy out: pairs, tokens, packed rows. Never touches a device."""

import logging


def _says_no_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" in record.getMessage()


# transformers says so when it is imported; here only its tokenizers are used, and
# those need no torch. Before the rooms below import it, hence at import time.
logging.getLogger("transformers").addFilter(lambda record: not _says_no_torch(record))
