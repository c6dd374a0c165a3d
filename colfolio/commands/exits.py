"""How the command line ends: a user's errors in a line and with exit code 1, all else as it is."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from colfolio.errors import ColfolioError

# A file system that refuses: full, failing, not to be written, or without a place of that name.
# Not limits of the machine (memory, open files): what met them is to be seen in a traceback.
_USERS_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
        *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
    }
)


@contextmanager
def errors_told() -> Iterator[None]:
    """End the process with a line where a user's error is met.

    Raises:
        SystemExit: with code 1.
    """
    try:
        yield
    except (ColfolioError, FloatingPointError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _USERS_ERRORS:
            raise
        _fail(
            f"{error.filename or 'writing'}: {error.strerror}; what was there before is untouched"
        )


def _fail(message: str) -> NoReturn:
    from rich.console import Console  # not for a command that ends well

    Console(stderr=True, soft_wrap=True, highlight=False).print(
        "error:", message, style="red", markup=False
    )
    sys.exit(1)
